"""PRM (Pei et al. 2019, arXiv 1904.06813): positions, self-attention, a perceptron (200, 80)."""

from __future__ import annotations

import jax
from flax import linen as nn

from dpo4rec_jax.models.lean import LeanEncoder
from dpo4rec_jax.models.list_attention import Block, LayerNorm, dropout


class PRM(nn.Module):
    """Learned position encodings are added to the candidates in the order they are given. The
    encoder is `blocks` of self-attention and feed-forward, as in the paper."""

    dropout: float = 0.0
    blocks: int = 2
    heads: int = 2
    feed_forward: int = 128
    hidden: tuple[int, ...] = (200, 80)

    @nn.compact
    def __call__(self, x_BND: jax.Array, mask_BN: jax.Array, training: bool) -> jax.Array:
        x_BND = _placed(self, x_BND)
        for i in range(self.blocks):
            block = Block(self.heads, self.feed_forward, self.dropout, name=f"block_{i}")
            x_BND = block(x_BND, None, mask_BN, training)
        x_BND = LayerNorm(name="norm")(x_BND)
        for i, width in enumerate(self.hidden):
            x_BND = nn.relu(nn.Dense(width, name=f"hidden_{i}")(x_BND))
            x_BND = dropout(self.dropout, training)(x_BND)
        return nn.Dense(1, name="score")(x_BND)[..., 0]


class SmallPRM(nn.Module):
    """PRM of two lean blocks, whose scores need no perceptron."""

    dropout: float = 0.0
    blocks: int = 2

    @nn.compact
    def __call__(self, x_BND: jax.Array, mask_BN: jax.Array, training: bool) -> jax.Array:
        encoder = LeanEncoder(self.blocks, self.dropout, name="encoder")
        return encoder(_placed(self, x_BND), mask_BN, training)


class TinyPRM(SmallPRM):
    """PRM of one lean block."""

    blocks: int = 1


def _placed(module: nn.Module, x_BND: jax.Array) -> jax.Array:
    """With what the module learns of each position added."""
    position_ND = module.param("position", nn.initializers.normal(0.02), x_BND.shape[1:])
    return x_BND + position_ND[None]
