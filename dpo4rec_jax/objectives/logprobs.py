"""Log-probabilities of given tokens, without ever holding all their logits.

The logits of T tokens over a vocabulary of V are the largest array of a training step (V is 128,256
for Llama 3). Here they exist for one chunk of tokens at a time, forward and backward, in float32.

The gradient of a token's log-probability by its hidden state, E_v[target] - sum_v p_v E_v, needs no
cotangent, so the forward pass takes it while the chunk's logits are at hand; the backward pass only
scales it. Under a frozen unembedding (LoRA) that saves the third of the three matrix products that
recomputation would need. The unembedding's own gradient does need the cotangent: where there is one
chunk, what the forward pass made of its logits is kept for it; where there are more, they are
recomputed. Where nobody asks for it, the compiler drops all that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo4rec_jax.products import summed

CHUNK_TOKENS = 256


def token_logps(
    hidden_BTD: Float[Array, "B T D"],
    unembedding_DV: Float[Array, "D V"],
    target_BT: Int[Array, "B T"],
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Float[Array, "B T"]:
    """log p(target) in nats, float32, where logits = hidden @ unembedding.

    The logits of `chunk_tokens` positions of every row are held at once: B x chunk_tokens x V
    float32, whatever T is. Rows stay whole, so a batch sharded over devices stays sharded.
    Differentiable in `hidden_BTD` and `unembedding_DV` (once); the latter's gradient is summed over
    chunks in float32.
    """
    num_tokens = target_BT.shape[1]
    num_chunks = max(1, -(-num_tokens // chunk_tokens))
    size = -(-num_tokens // num_chunks)
    pad = num_chunks * size - num_tokens
    hidden_BTD = jnp.pad(hidden_BTD, ((0, 0), (0, pad), (0, 0)))
    target_BT = jnp.pad(target_BT, ((0, 0), (0, pad)))
    logp_BT: Any = _token_logps(hidden_BTD, unembedding_DV, target_BT, num_chunks)
    return logp_BT[:, :num_tokens]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _token_logps(
    hidden_BTD: Array, unembedding_DV: Array, target_BT: Array, num_chunks: int
) -> Array:
    def one_chunk(hidden: Array, target: Array) -> Array:
        return _logits_and_logps(hidden, target, unembedding_DV)[0]

    return _by_chunk(one_chunk, num_chunks, hidden_BTD, target_BT)


def _forward(
    hidden_BTD: Array, unembedding_DV: Array, target_BT: Array, num_chunks: int
) -> tuple[Array, tuple[Array, ...]]:
    def one_chunk(hidden: Array, target: Array) -> tuple[Array, ...]:
        logp, logits, logz = _logits_and_logps(hidden, target, unembedding_DV)
        slope = _logit_gradient(logits, logz, target).astype(hidden.dtype)
        by_hidden = summed("btv,dv->btd", slope, unembedding_DV.astype(hidden.dtype))
        return logp, by_hidden, slope if num_chunks == 1 else logz

    logp, by_hidden, kept = _by_chunk(one_chunk, num_chunks, hidden_BTD, target_BT)
    return logp, (hidden_BTD, unembedding_DV, target_BT, by_hidden, kept)


def _backward(
    num_chunks: int, residuals: tuple[Array, ...], cotangent_BT: Array
) -> tuple[Array, Array, None]:
    hidden_BTD, unembedding_DV, target_BT, by_hidden_BTD, kept = residuals

    def of_chunk(hidden: Array, target: Array, kept: Array, cotangent: Array) -> Array:
        slope = kept  # of the only chunk, or the log-normaliser that it is recomputed from
        if num_chunks > 1:
            slope = _logit_gradient(_logits(hidden, unembedding_DV), kept, target)
        # The cotangent goes to the hidden state, a small part of the logits' size.
        weighted = (hidden * cotangent[..., None]).astype(hidden.dtype)
        return summed("btd,btv->dv", weighted, slope.astype(hidden.dtype))

    arrays = (hidden_BTD, target_BT, kept, cotangent_BT)
    by_unembedding_DV = _sum_of_chunks(of_chunk, num_chunks, *arrays)
    by_hidden_BTD = by_hidden_BTD * cotangent_BT[..., None]
    return (
        by_hidden_BTD.astype(hidden_BTD.dtype),
        by_unembedding_DV.astype(unembedding_DV.dtype),
        None,
    )


_token_logps.defvjp(_forward, _backward)


def _logits(hidden: Array, unembedding_DV: Array) -> Array:
    return summed("btd,dv->btv", hidden, unembedding_DV.astype(hidden.dtype))


def _logits_and_logps(
    hidden: Array, target: Array, unembedding_DV: Array
) -> tuple[Array, Array, Array]:
    logits = _logits(hidden, unembedding_DV)
    logz = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    return chosen - logz, logits, logz


def _logit_gradient(logits: Array, logz: Array, target: Array) -> Array:
    """d log p(target) / d logits = onehot(target) - softmax(logits)."""
    onehot = jax.lax.broadcasted_iota(target.dtype, logits.shape, 2) == target[..., None]
    return onehot.astype(jnp.float32) - jnp.exp(logits - logz[..., None])


def _by_chunk(function: Callable[..., Any], num_chunks: int, *arrays: Array) -> Any:
    """A function of tokens applied to one chunk of them after the other. A single chunk goes
    without the loop, which would copy the unembedding, transposed, for its body."""
    if num_chunks == 1:
        return function(*arrays)
    chunks = tuple(_split(array, num_chunks) for array in arrays)
    _, results = jax.lax.scan(lambda _, chunk: (None, function(*chunk)), None, chunks)
    return jax.tree.map(_join, results)


def _sum_of_chunks(function: Callable[..., Array], num_chunks: int, *arrays: Array) -> Array:
    if num_chunks == 1:
        return function(*arrays)
    chunks = tuple(_split(array, num_chunks) for array in arrays)
    total = function(*(chunk[0] for chunk in chunks))
    rest = tuple(chunk[1:] for chunk in chunks)
    return jax.lax.scan(lambda sum, chunk: (sum + function(*chunk), None), total, rest)[0]


def _split(array: Any, num_chunks: int) -> Any:
    """B, T, ... -> chunk, B, T / chunk, ..."""
    rows, tokens, *rest = array.shape
    return jnp.moveaxis(array.reshape(rows, num_chunks, tokens // num_chunks, *rest), 1, 0)


def _join(array: Any) -> Any:
    num_chunks, rows, tokens, *rest = array.shape
    return jnp.moveaxis(array, 0, 1).reshape(rows, num_chunks * tokens, *rest)
