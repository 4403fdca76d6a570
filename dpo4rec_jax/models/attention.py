"""How tokens of a row see each other: strategies for `llama.apply`, each one pytree.

`Causal` is the plain right-padded row. `Shared` is one prompt with C completions behind it, the
prompt computed once: a DPO pair is C = 2, and ranking all of a user's samples is C = N.

The shared arithmetic is `attend` over one block of keys, and `merge` of several blocks into one
softmax by their log-sum-exp, so blocks may differ in layout and no mask spans what is not computed.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Implementation = Literal["xla", "cudnn", "splash"]
MASKED = -1e30  # finite, so a row that sees nothing stays finite


class Block(NamedTuple):
    """Softmax over one block of keys before division: values weighted by exp(score - maximum)."""

    out_BTHd: Float[Array, "B T H d"]
    maximum_BTH: Float[Array, "B T H"]
    total_BTH: Float[Array, "B T H"]


def attend(
    query_BTHd: Float[Array, "B T H d"],
    key_BSKd: Float[Array, "B S K d"],
    value_BSKd: Float[Array, "B S K d"],
    mask_BTS: Bool[Array, "#B #T #S"],
) -> Block:
    """One block of scaled dot-product attention, softmax in float32; H / K query heads in a row
    share a key head (repeat-interleave grouping). Rows without a key give zeros and total 0."""
    (B, T, H, d), K = query_BTHd.shape, key_BSKd.shape[2]
    precision = jax.lax.Precision.HIGHEST if query_BTHd.dtype == jnp.float32 else None
    einsum = _einsum(precision)
    query_BTKGd = query_BTHd.reshape(B, T, K, H // K, d)
    # Output axes in dot_general's own order (batch, lhs, rhs): scores are never transposed.
    score_BKTGS = einsum("btkgd,bskd->bktgs", query_BTKGd, key_BSKd) * d**-0.5
    mask_BKTGS = jnp.broadcast_to(mask_BTS[:, None, :, None, :], score_BKTGS.shape)
    score_BKTGS = jnp.where(mask_BKTGS, score_BKTGS, MASKED)
    # The maximum cancels in merge; no gradient through it.
    maximum_BKTG = jax.lax.stop_gradient(score_BKTGS.max(axis=-1))
    weight_BKTGS = jnp.where(mask_BKTGS, jnp.exp(score_BKTGS - maximum_BKTG[..., None]), 0.0)
    out_BKTGd = einsum("bktgs,bskd->bktgd", weight_BKTGS.astype(value_BSKd.dtype), value_BSKd)
    return Block(
        out_BTHd=out_BKTGd.transpose(0, 2, 1, 3, 4).reshape(B, T, H, d),
        maximum_BTH=maximum_BKTG.transpose(0, 2, 1, 3).reshape(B, T, H),
        total_BTH=weight_BKTGS.sum(axis=-1).transpose(0, 2, 1, 3).reshape(B, T, H),
    )


def _einsum(precision: jax.lax.Precision | None) -> Any:
    def einsum(expression: str, *operands: Array) -> Array:
        return jnp.einsum(
            expression, *operands, precision=precision, preferred_element_type=jnp.float32
        )

    return einsum


def merge(*blocks: Block) -> Float[Array, "B T H d"]:
    """One softmax over the keys of all blocks, float32; rows that see no key at all give zeros."""
    maximum_BTH = blocks[0].maximum_BTH
    for block in blocks[1:]:
        maximum_BTH = jnp.maximum(maximum_BTH, block.maximum_BTH)
    factors = [jnp.exp(block.maximum_BTH - maximum_BTH) for block in blocks]
    total_BTH = sum(block.total_BTH * factor for block, factor in zip(blocks, factors, strict=True))
    out_BTHd = sum(
        block.out_BTHd * factor[..., None] for block, factor in zip(blocks, factors, strict=True)
    )
    safe_BTH = jnp.where(total_BTH > 0, total_BTH, 1.0)
    return out_BTHd / safe_BTH[..., None]


def visible(
    query_position_BT: Int[Array, "B T"],
    key_position_BS: Int[Array, "B S"],
    window: int | None = None,
) -> Bool[Array, "B T S"]:
    """Causal by position, and within the sliding window (a token sees `window` - 1 before it)."""
    distance_BTS = query_position_BT[:, :, None] - key_position_BS[:, None, :]
    mask_BTS = distance_BTS >= 0
    return mask_BTS if window is None else mask_BTS & (distance_BTS < window)


@flax.struct.dataclass
class Causal:
    """Right-padded rows, each token seeing itself and those before it.

    With `keep_kv` the new cache is {"key": L B T K d, "value": ...}, keys rotated: a prefill.
    What padded positions hold is finite and meaningless.
    """

    length_B: Int[Array, " B"]
    keep_kv: bool = flax.struct.field(pytree_node=False, default=False)
    implementation: Implementation = flax.struct.field(pytree_node=False, default="xla")

    def position_BT(self, num_tokens: int) -> Int[Array, "B T"]:
        """Positions 0, 1, ... of every row."""
        shape_BT = (self.length_B.shape[0], num_tokens)
        return jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32), shape_BT)

    def __call__(
        self,
        query_BTHd: Float[Array, "B T H d"],
        key_BTKd: Float[Array, "B T K d"],
        value_BTKd: Float[Array, "B T K d"],
        position_BT: Int[Array, "B T"],
        cache_layer: Any = None,
        window: int | None = None,
    ) -> tuple[Float[Array, "B T H d"], Any]:
        out_BTHd = causal(query_BTHd, key_BTKd, value_BTKd, position_BT, window)
        kept = {"key": key_BTKd, "value": value_BTKd} if self.keep_kv else None
        return out_BTHd, kept


@flax.struct.dataclass
class Shared:
    """Packed rows [prompt | completion 0 | completion 1 ...], each part padded to its static size.

    The prompt is causal; a completion sees the valid prompt and, causally, itself. Nothing between
    completions is computed. Valid positions equal those of C separate [prompt | completion] rows.
    """

    prompt_length_B: Int[Array, " B"]
    completion_length_BC: Int[Array, "B C"]
    prompt_tokens: int = flax.struct.field(pytree_node=False)
    completions: int = flax.struct.field(pytree_node=False)
    completion_tokens: int = flax.struct.field(pytree_node=False)
    implementation: Implementation = flax.struct.field(pytree_node=False, default="xla")

    def position_BT(self) -> Int[Array, "B T"]:
        """Positions of the packed row: every completion continues where its prompt really ends."""
        B = self.prompt_length_B.shape[0]
        prompt_BT = jnp.broadcast_to(
            jnp.arange(self.prompt_tokens, dtype=jnp.int32), (B, self.prompt_tokens)
        )
        own_T = jnp.arange(self.completion_tokens, dtype=jnp.int32)
        completion_BT = self.prompt_length_B[:, None] + jnp.tile(own_T, self.completions)[None]
        return jnp.concatenate([prompt_BT, completion_BT.astype(jnp.int32)], axis=1)

    def __call__(
        self,
        query_BTHd: Float[Array, "B T H d"],
        key_BTKd: Float[Array, "B T K d"],
        value_BTKd: Float[Array, "B T K d"],
        position_BT: Int[Array, "B T"],
        cache_layer: Any = None,
        window: int | None = None,
    ) -> tuple[Float[Array, "B T H d"], None]:
        Tp, C, Tc = self.prompt_tokens, self.completions, self.completion_tokens
        assert query_BTHd.shape[1] == Tp + C * Tc, (query_BTHd.shape, Tp, C, Tc)
        prompt = causal(
            query_BTHd[:, :Tp], key_BTKd[:, :Tp], value_BTKd[:, :Tp], position_BT[:, :Tp], window
        )
        query, key, value = query_BTHd[:, Tp:], key_BTKd[:, Tp:], value_BTKd[:, Tp:]
        valid_BS = jnp.arange(Tp)[None] < self.prompt_length_B[:, None]
        mask_BTS = valid_BS[:, None, :]
        if window is not None:
            mask_BTS = mask_BTS & visible(position_BT[:, Tp:], position_BT[:, :Tp], window)
        on_prompt = attend(query, key_BTKd[:, :Tp], value_BTKd[:, :Tp], mask_BTS)

        def by_completion(x_BT: Array) -> Array:
            return x_BT.reshape(-1, Tc, *x_BT.shape[2:])

        own_position = by_completion(position_BT[:, Tp:])
        on_self = attend(
            by_completion(query),
            by_completion(key),
            by_completion(value),
            visible(own_position, own_position, window),
        )
        on_self = Block(*(x.reshape(query.shape[0], C * Tc, *x.shape[2:]) for x in on_self))
        completion = merge(on_prompt, on_self).astype(query_BTHd.dtype)
        return jnp.concatenate([prompt, completion], axis=1), None


def causal(
    query_BTHd: Float[Array, "B T H d"],
    key_BTKd: Float[Array, "B T K d"],
    value_BTKd: Float[Array, "B T K d"],
    position_BT: Int[Array, "B T"],
    window: int | None = None,
) -> Float[Array, "B T H d"]:
    """Self-attention of rows whose positions rise one by one."""
    mask_BTS = visible(position_BT, position_BT, window)
    return merge(attend(query_BTHd, key_BTKd, value_BTKd, mask_BTS)).astype(query_BTHd.dtype)
