"""Log-probabilities of given tokens, without ever holding all their logits.

The logits of T tokens over a vocabulary of V are the largest array of a training step (V is 128,256
for Llama 3). Here they exist for one chunk of tokens at a time, forward and backward, in float32.

The gradient of a token's log-probability by its hidden state, E_v[target] - sum_v p_v E_v, needs no
cotangent, so the forward pass takes it while the chunk's logits are at hand; the backward pass only
scales it. Under a frozen unembedding (LoRA) that saves the third of the three matrix products that
recomputation would need. The unembedding's own gradient recomputes the chunk's logits; where nobody
asks for it, the compiler drops that loop whole.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CHUNK_TOKENS = 128


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
    def one_chunk(carry: None, chunk: tuple[Array, Array]) -> tuple[None, Array]:
        logp = _logits_and_logps(*chunk, unembedding_DV)[0]
        return None, logp

    chunks = _split(hidden_BTD, num_chunks), _split(target_BT, num_chunks)
    return _join(jax.lax.scan(one_chunk, None, chunks)[1])


def _forward(
    hidden_BTD: Array, unembedding_DV: Array, target_BT: Array, num_chunks: int
) -> tuple[Array, tuple[Array, ...]]:
    def one_chunk(_: None, chunk: tuple[Array, Array]) -> tuple[None, tuple[Array, ...]]:
        hidden, target = chunk
        logp, logits, logz = _logits_and_logps(hidden, target, unembedding_DV)
        slope = _logit_gradient(logits, logz, target).astype(hidden.dtype)
        by_hidden = _product("btv,dv->btd", slope, unembedding_DV.astype(hidden.dtype))
        return None, (logp, logz, by_hidden)

    chunks = _split(hidden_BTD, num_chunks), _split(target_BT, num_chunks)
    logp, logz, by_hidden = map(_join, jax.lax.scan(one_chunk, None, chunks)[1])
    return logp, (hidden_BTD, unembedding_DV, target_BT, logz, by_hidden)


def _backward(
    num_chunks: int, residuals: tuple[Array, ...], cotangent_BT: Array
) -> tuple[Array, Array, None]:
    hidden_BTD, unembedding_DV, target_BT, logz_BT, by_hidden_BTD = residuals

    def one_chunk(total_DV: Array, chunk: tuple[Array, ...]) -> tuple[Array, None]:
        hidden, target, logz, cotangent = chunk
        logits = _logits(hidden, unembedding_DV)
        slope = _logit_gradient(logits, logz, target) * cotangent[..., None]
        return total_DV + _product("btd,btv->dv", hidden, slope.astype(hidden.dtype)), None

    chunks = tuple(_split(x, num_chunks) for x in (hidden_BTD, target_BT, logz_BT, cotangent_BT))
    zeros_DV = jnp.zeros(unembedding_DV.shape, jnp.float32)
    by_unembedding_DV, _ = jax.lax.scan(one_chunk, zeros_DV, chunks)
    by_hidden_BTD = by_hidden_BTD * cotangent_BT[..., None]
    return (
        by_hidden_BTD.astype(hidden_BTD.dtype),
        by_unembedding_DV.astype(unembedding_DV.dtype),
        None,
    )


_token_logps.defvjp(_forward, _backward)


def _product(spec: str, left: Array, right: Array) -> Array:
    """Accumulated in float32; of float32 factors in full precision, not the accelerator's TF32."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jnp.einsum(spec, left, right, precision=precision, preferred_element_type=jnp.float32)


def _logits(hidden: Array, unembedding_DV: Array) -> Array:
    return _product("btd,dv->btv", hidden, unembedding_DV.astype(hidden.dtype))


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


def _split(array: Any, num_chunks: int) -> Any:
    """B, T, ... -> chunk, B, T / chunk, ..."""
    rows, tokens, *rest = array.shape
    return jnp.moveaxis(array.reshape(rows, num_chunks, tokens // num_chunks, *rest), 1, 0)


def _join(array: Any) -> Any:
    num_chunks, rows, tokens, *rest = array.shape
    return jnp.moveaxis(array, 0, 1).reshape(rows, num_chunks * tokens, *rest)
