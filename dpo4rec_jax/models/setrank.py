"""SetRank (Pang et al. 2020, arXiv 1912.05891): self-attention without positions.

Permutation-equivariant: reordering the candidates reorders their scores. Blocks are pre-norm, and
the scores of a fresh model are near 0, which is what lets it train at ordinary learning rates.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpo4rec_jax.models.lean import LeanEncoder
from dpo4rec_jax.models.list_attention import Block, LayerNorm


class SetRank(nn.Module):
    """`blocks` multi-head self-attention blocks, then a score by candidate.

    With `inducing` points the candidates attend to that many learned queries' summary of the list
    instead of to each other (ISAB): linear, not quadratic, in the length of the list.
    """

    dropout: float = 0.0
    blocks: int = 2
    heads: int = 2
    hidden: int = 128
    inducing: int = 0

    @nn.compact
    def __call__(self, x_BND: jax.Array, mask_BN: jax.Array, training: bool) -> jax.Array:
        for i in range(self.blocks):
            block = Block(self.heads, self.hidden, self.dropout, name=f"block_{i}")
            if not self.inducing:
                x_BND = block(x_BND, None, mask_BN, training)
                continue
            width = x_BND.shape[-1]
            init = nn.initializers.normal(width**-0.5)
            point_SD = self.param(f"inducing_{i}", init, (self.inducing, width))
            point_BSD = jnp.broadcast_to(point_SD, (x_BND.shape[0], *point_SD.shape))
            gather = Block(self.heads, self.hidden, self.dropout, name=f"gather_{i}")
            summary_BSD = gather(point_BSD, x_BND, mask_BN, training)
            x_BND = block(x_BND, summary_BSD, jnp.ones(summary_BSD.shape[:2], bool), training)
        x_BND = LayerNorm(name="norm")(x_BND)
        init = nn.initializers.variance_scaling(0.1, "fan_in", "truncated_normal")
        return nn.Dense(1, kernel_init=init, name="score")(x_BND)[..., 0]


class InducedSetRank(SetRank):
    """SetRank with 16 inducing points a block."""

    inducing: int = 16


class SmallSetRank(nn.Module):
    """SetRank of two lean blocks."""

    dropout: float = 0.0
    blocks: int = 2

    @nn.compact
    def __call__(self, x_BND: jax.Array, mask_BN: jax.Array, training: bool) -> jax.Array:
        return LeanEncoder(self.blocks, self.dropout, name="encoder")(x_BND, mask_BN, training)


class TinySetRank(SmallSetRank):
    """SetRank of one lean block."""

    blocks: int = 1
