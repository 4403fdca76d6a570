"""Blocks of PRM and SetRank for where time counts: what one attention head needs, and no more.

With one head, the products of W_q and W_k, and of W_v and W_o, are each one matrix (the score is
Luong's "general" one, arXiv 1508.04025), and the latter may be left to the feed-forward half that
follows. Norms are root mean squares (Zhang and Sennrich 2019, arXiv 1910.07467) without weights of
their own, which the products behind them have. docs/benchmarks.md has what that saves and costs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpo4rec_jax.models.list_attention import HIDDEN_SCORE, NORM_EPSILON, dropout, softmax
from dpo4rec_jax.models.row_sums import row_sums


@jax.custom_vjp
def scaled(x: jax.Array) -> jax.Array:
    """Root mean square 1 over the last axis."""
    return _scaled(x)[0]


def _scaled(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    inverse = jax.lax.rsqrt(row_sums(x * x) / x.shape[-1] + NORM_EPSILON)
    y = x * inverse
    return y, (y, inverse)


def _scaled_backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array]:
    y, inverse = saved
    return (inverse * (grad - y * (row_sums(grad * y) / y.shape[-1])),)


scaled.defvjp(_scaled, _scaled_backward)


@jax.custom_vjp
def looked_up(query_BND: jax.Array, key_BSD: jax.Array, mask_BS: jax.Array) -> jax.Array:
    """For each query the mean of the real keys, weighed by the softmax of their products with it,
    divided by sqrt(D). Keys are their own values.

    The gradient's products are written so that the lists' small matrices are what is transposed:
    as autodiff writes them they take several times as long on CPUs.
    """
    return _look_up(query_BND, key_BSD, mask_BS)[0]


def _look_up(
    query_BND: jax.Array, key_BSD: jax.Array, mask_BS: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    score_BNS = _product(query_BND, key_BSD.mT) * key_BSD.shape[-1] ** -0.5
    score_BNS = jnp.where(mask_BS[:, None], score_BNS, HIDDEN_SCORE)
    weight_BNS = softmax(score_BNS)
    return _product(weight_BNS, key_BSD), (query_BND, key_BSD, weight_BNS)


def _look_up_backward(
    saved: tuple[jax.Array, jax.Array, jax.Array], grad_BND: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    query_BND, key_BSD, weight_BNS = saved
    slope_BNS = weight_BNS * _product(grad_BND, key_BSD.mT)
    slope_BNS = slope_BNS - weight_BNS * row_sums(slope_BNS)
    slope_BNS = slope_BNS * key_BSD.shape[-1] ** -0.5
    by_key_BSD = _product(slope_BNS.mT, query_BND) + _product(weight_BNS.mT, grad_BND)
    return _product(slope_BNS, key_BSD), by_key_BSD, None


looked_up.defvjp(_look_up, _look_up_backward)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    # Backward rules are traced outside of the context in which `reranker` sets the precision.
    return jnp.matmul(x, y, precision="highest")


class LeanBlock(nn.Module):
    """A pre-norm transformer block of one head, its feed-forward half as wide as the candidates."""

    dropout: float

    @nn.compact
    def __call__(self, x_BND: jax.Array, mask_BN: jax.Array, training: bool) -> jax.Array:
        width = x_BND.shape[-1]
        drop = dropout(self.dropout, training)
        y_BND = scaled(x_BND)
        query_BND = nn.Dense(width, use_bias=False, name="query")(y_BND)
        x_BND = x_BND + drop(looked_up(query_BND, y_BND, mask_BN))
        h_BND = nn.relu(nn.Dense(width, name="up")(scaled(x_BND)))
        return x_BND + drop(nn.Dense(width, name="down")(h_BND))


class LeanEncoder(nn.Module):
    """So many lean blocks, and a score by candidate."""

    blocks: int
    dropout: float

    @nn.compact
    def __call__(self, x_BND: jax.Array, mask_BN: jax.Array, training: bool) -> jax.Array:
        for i in range(self.blocks):
            x_BND = LeanBlock(self.dropout, name=f"block_{i}")(x_BND, mask_BN, training)
        init = nn.initializers.variance_scaling(0.1, "fan_in", "truncated_normal")
        return nn.Dense(1, kernel_init=init, name="score")(scaled(x_BND))[..., 0]
