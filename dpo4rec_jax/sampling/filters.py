"""Drawing one token a row under temperature, top-k and top-p, none of which recompiles.

Nothing here sorts the vocabulary. A token is drawn by inverse transform in two levels (a block of
the vocabulary, then a token of the block) and top-p is kept by rejection with a rising pivot, as
in FlashInfer's sorting-free sampling (Ye et al. 2025, arXiv 2501.01005): a token outside of the
nucleus is drawn again, from what is likelier than it. The result is distributed exactly as the
renormalised nucleus, and with top_p = 0.95 most rows are through at the first draw: two passes
over the logits where a sort is some hundred.
"""

from __future__ import annotations

import math

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

BLOCK = 128  # tokens a block, at the most; 384 blocks for a vocabulary of 49,152
SMALLEST_BLOCK = 32
MOST_PARTS = 8  # of a vocabulary that is split over devices


@flax.struct.dataclass
class Settings:
    """Traced, so that a change of them reuses the compiled program.

    Filters apply in HF's order: temperature, top-k, then top-p on what top-k left. A token is in
    the nucleus where what is strictly likelier has less than `top_p` of the mass; equal tokens are
    in or out together. Temperature 0 takes the likeliest token; top_k 0 keeps all.
    """

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    top_k: Int[Array, ""]

    @classmethod
    def of(cls, temperature: float, top_p: float, top_k: int) -> Settings:
        return cls(jnp.float32(temperature), jnp.float32(top_p), jnp.int32(top_k))


def draw(
    logits_BV: Float[Array, "B V"], key_B: Key[Array, " B"], settings: Settings
) -> Int[Array, " B"]:
    """One token a row, 0 where its logits are no numbers. What a row draws depends on its own
    logits and key only."""
    return jax.lax.cond(
        settings.temperature > 0,
        lambda: _sample(logits_BV, key_B, settings),
        lambda: jnp.argmax(logits_BV, axis=-1).astype(jnp.int32),
    )


def token_logps(logits_BV: Float[Array, "B V"], token_B: Int[Array, " B"]) -> Float[Array, " B"]:
    """Log-probabilities of tokens under the policy itself: no temperature, no filter."""
    return _chosen(logits_BV, token_B) - jax.nn.logsumexp(logits_BV, axis=-1)


def token_margins(logits_BV: Float[Array, "B V"], token_B: Int[Array, " B"]) -> Float[Array, " B"]:
    """Logits of tokens less the largest of their row: no number where any of the row is none. A
    pass less over the vocabulary than `token_logps`."""
    return _chosen(logits_BV, token_B) - logits_BV.max(axis=-1)


def _chosen(x_BV: Array, token_B: Array) -> Array:
    return jnp.take_along_axis(x_BV, token_B[:, None], axis=-1)[:, 0]


def _sample(logits_BV: Array, key_B: Array, settings: Settings) -> Array:
    B, V = logits_BV.shape
    padding = -V % block_tokens(V)
    score_BV = logits_BV / settings.temperature
    if padding:
        score_BV = jnp.pad(score_BV, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    weight_BV = jnp.exp(score_BV - score_BV.max(axis=-1, keepdims=True))
    floor_B = jax.lax.cond(
        settings.top_k > 0,
        lambda: _below_top_k(score_BV, settings.top_k),
        lambda: jnp.full(B, -jnp.inf),
    )
    total_B = _mass_above(score_BV, weight_BV, floor_B)

    def unfinished(state: tuple[Array, ...]) -> Array:
        return ~state[-1].all()

    def attempt(state: tuple[Array, ...]) -> tuple[Array, ...]:
        trial, pivot_B, token_B, done_B = state
        trial_key_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(key_B, trial)
        drawn_B = _inverse_transform(score_BV, weight_BV, pivot_B, trial_key_B)
        drawn_score_B = _chosen(score_BV, drawn_B)
        likelier_B = _mass_above(score_BV, weight_BV, drawn_score_B)
        accepted_B = (likelier_B < settings.top_p * total_B) | (settings.top_p >= 1)
        return (
            trial + 1,
            jnp.where(done_B | accepted_B, pivot_B, drawn_score_B),
            jnp.where(done_B, token_B, drawn_B),
            done_B | accepted_B,
        )

    # A row without numbers draws nothing, or it would be drawn again for ever.
    start = (jnp.int32(0), floor_B, jnp.zeros(B, jnp.int32), ~(total_B > 0))
    return jax.lax.while_loop(unfinished, attempt, start)[2]


def block_tokens(vocabulary: int) -> int:
    """Tokens of a block, such that no block lies on two devices where the vocabulary is split.

    Of Llama 3's 128,256 a quarter is 250.5 blocks of 128: two devices would exchange their logits
    for every token. Vocabularies that do not divide are not split, and get padding instead.
    """
    parts = MOST_PARTS
    while parts:
        if vocabulary % (parts * SMALLEST_BLOCK) == 0:
            return math.gcd(vocabulary // parts, BLOCK)
        parts //= 2
    return BLOCK


def _mass_above(score_BV: Array, weight_BV: Array, bound_B: Array) -> Array:
    above_BV = score_BV > jnp.broadcast_to(bound_B[:, None], score_BV.shape)
    return jnp.where(above_BV, weight_BV, 0.0).sum(axis=-1)


def _inverse_transform(score_BV: Array, weight_BV: Array, above_B: Array, key_B: Array) -> Array:
    """A token with score above `above_B`, in proportion to its weight."""
    B, V = score_BV.shape
    uniform_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(key_B)
    kept_BV = score_BV > jnp.broadcast_to(above_B[:, None], score_BV.shape)
    block = block_tokens(V)
    kept_weight_BV = jnp.where(kept_BV, weight_BV, 0.0).reshape(B, V // block, block)
    block_B = _first_beyond(kept_weight_BV.sum(axis=-1), uniform_B2[:, 0])
    inside_B = jnp.take_along_axis(kept_weight_BV, block_B[:, None, None], axis=1)[:, 0]
    return block_B * block + _first_beyond(inside_B, uniform_B2[:, 1])


def _first_beyond(weight_BN: Array, uniform_B: Array) -> Array:
    """The first index where the cumulated weight exceeds uniform x total; its weight is positive.

    The total is the largest partial sum at a positive weight, so rounding in the sums can neither
    leave a row without an index nor pick one of weight zero.
    """
    cumulated_BN = jnp.where(weight_BN > 0, jnp.cumsum(weight_BN, axis=-1), 0.0)
    target_B1 = uniform_B[:, None] * cumulated_BN.max(axis=-1, keepdims=True)
    return jnp.argmax(cumulated_BN > target_B1, axis=-1).astype(jnp.int32)


def _below_top_k(score_BV: Array, top_k: Array) -> Array:
    """The largest score that is not among each row's `top_k` likeliest (ties with the k-th stay).

    Bisection over the 32 bits of the scores' order: 32 counting passes, no sort.
    """
    order_BV = _ordered_bits(score_BV)

    def halve(bit: Array, kth_B: Array) -> Array:
        candidate_B = kth_B | (jnp.uint32(1) << (31 - bit).astype(jnp.uint32))
        count_B = (order_BV >= candidate_B[:, None]).sum(axis=-1)
        return jnp.where(count_B >= top_k, candidate_B, kth_B)

    kth_B = jax.lax.fori_loop(0, 32, halve, jnp.zeros(score_BV.shape[0], jnp.uint32))
    below_BV = order_BV < jnp.broadcast_to(kth_B[:, None], order_BV.shape)
    return jnp.where(below_BV, score_BV, -jnp.inf).max(axis=-1)


def _ordered_bits(x: Array) -> Array:
    """uint32 in the same order as the floats."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    negative = (bits >> 31).astype(bool)
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))
