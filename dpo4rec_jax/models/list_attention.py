"""Attention among the candidates of a list, as PRM and SetRank share it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpo4rec_jax.models.row_sums import row_sums

# Instead of minus infinity: a list that is all padding gets uniform attention, not NaN.
HIDDEN_SCORE = -1e9
NORM_EPSILON = 1e-6


def dropout(rate: float, training: bool, candidates: int = 1) -> nn.Dropout:
    """Drops a feature in the whole list at once (axis `candidates`): candidates stay comparable,
    and a tenth of the random numbers is drawn, which on a CPU cost more than the products they
    drop."""
    return nn.Dropout(rate, broadcast_dims=(candidates,), deterministic=not training)


@jax.custom_vjp
def normalised(x: jax.Array) -> jax.Array:
    """Mean 0 and variance 1 over the last axis."""
    return _normalised(x)[0]


def _normalised(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    centred = x - row_sums(x) / x.shape[-1]
    inverse = jax.lax.rsqrt(row_sums(centred * centred) / x.shape[-1] + NORM_EPSILON)
    y = centred * inverse
    return y, (y, inverse)


def _normalised_backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array]:
    y, inverse = saved
    width = y.shape[-1]
    return (inverse * (grad - row_sums(grad) / width - y * (row_sums(grad * y) / width)),)


normalised.defvjp(_normalised, _normalised_backward)


@jax.custom_vjp
def softmax(x: jax.Array) -> jax.Array:
    """Over the last axis."""
    return _softmax(x)[0]


def _softmax(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    weight = jnp.exp(x - x.max(-1, keepdims=True))
    weight = weight / row_sums(weight)
    return weight, weight


def _softmax_backward(weight: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    product = weight * grad
    return (product - weight * row_sums(product),)


softmax.defvjp(_softmax, _softmax_backward)


class LayerNorm(nn.Module):
    """Flax's, parameters and all, with its sums as products."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        before = tuple(range(x.ndim - 1))
        scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros_init(), x.shape[-1:])
        return normalised(x) * jnp.expand_dims(scale, before) + jnp.expand_dims(bias, before)


class Attention(nn.Module):
    """Multi-head attention of queries to the valid keys; no positions, so permutation-equivariant.

    `mask_BS` is True on real keys. No dropout on the attention weights: the residual has it.
    """

    heads: int

    @nn.compact
    def __call__(self, query_BND: jax.Array, key_BSD: jax.Array, mask_BS: jax.Array) -> jax.Array:
        width = query_BND.shape[-1]
        assert width % self.heads == 0, f"{self.heads} heads do not divide width {width}"
        size = width // self.heads
        q_BNHd = nn.Dense(width, name="query")(query_BND).reshape(
            *query_BND.shape[:-1], self.heads, size
        )
        kv = nn.Dense(2 * width, name="key_value")(key_BSD)
        k_BSHd, v_BSHd = (
            x.reshape(*key_BSD.shape[:-1], self.heads, size) for x in jnp.split(kv, 2, axis=-1)
        )
        score_BHNS = jnp.einsum("bnhd,bshd->bhns", q_BNHd, k_BSHd) * size**-0.5
        score_BHNS = jnp.where(mask_BS[:, None, None], score_BHNS, HIDDEN_SCORE)
        weight_BHNS = softmax(score_BHNS.astype(jnp.float32)).astype(v_BSHd.dtype)
        out_BNHd = jnp.einsum("bhns,bshd->bnhd", weight_BHNS, v_BSHd)
        return nn.Dense(width, name="out")(out_BNHd.reshape(query_BND.shape))


class Block(nn.Module):
    """A pre-norm transformer block; `hidden` 0 leaves out the feed-forward half."""

    heads: int
    hidden: int
    dropout: float

    @nn.compact
    def __call__(
        self, x_BND: jax.Array, y_BSD: jax.Array | None, mask_BS: jax.Array, training: bool
    ) -> jax.Array:
        """x attends to y, or to itself where y is None."""
        drop = dropout(self.dropout, training)
        query_BND = LayerNorm(name="norm")(x_BND)
        key_BSD = query_BND if y_BSD is None else LayerNorm(name="norm_key")(y_BSD)
        x_BND = x_BND + drop(Attention(self.heads, name="attention")(query_BND, key_BSD, mask_BS))
        if not self.hidden:
            return x_BND
        h_BND = nn.relu(nn.Dense(self.hidden, name="up")(LayerNorm(name="norm_mlp")(x_BND)))
        return x_BND + drop(nn.Dense(x_BND.shape[-1], name="down")(h_BND))
