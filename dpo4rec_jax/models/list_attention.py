"""Attention among the candidates of a list, as PRM and SetRank share it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

# Instead of minus infinity: a list that is all padding gets uniform attention, not NaN.
HIDDEN_SCORE = -1e9


def dropout(rate: float, training: bool) -> nn.Dropout:
    """Drops a feature in the whole list at once: candidates stay comparable, and a tenth of the
    random numbers is drawn, which on a CPU cost more than the products they drop."""
    return nn.Dropout(rate, broadcast_dims=(1,), deterministic=not training)


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
        weight_BHNS = nn.softmax(score_BHNS.astype(jnp.float32), axis=-1).astype(v_BSHd.dtype)
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
        query_BND = nn.LayerNorm(name="norm")(x_BND)
        key_BSD = query_BND if y_BSD is None else nn.LayerNorm(name="norm_key")(y_BSD)
        x_BND = x_BND + drop(Attention(self.heads, name="attention")(query_BND, key_BSD, mask_BS))
        if not self.hidden:
            return x_BND
        h_BND = nn.relu(nn.Dense(self.hidden, name="up")(nn.LayerNorm(name="norm_mlp")(x_BND)))
        return x_BND + drop(nn.Dense(x_BND.shape[-1], name="down")(h_BND))
