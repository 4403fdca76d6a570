"""What a user's window says about a candidate: attention from the candidate to what he rated.

An option: neither PRM nor DLCM sees the history in KAR. The embeddings are those of the candidates,
so similar tastes are found by the same vectors that tell items apart.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpo4rec_jax.models.list_attention import HIDDEN_SCORE, softmax

RATINGS = 6  # embeddings of ratings: none, and 1 to 5 stars


class TargetAttention(nn.Module):
    """For each candidate a mean, by head, of what was rated and how, weighted by similarity; one
    learned vector where the window is empty. (Zhou et al. 2018, DIN, with scaled dot products.)

    `rating_BH` holds stars rounded to 1..5, 0 where there is none, and -1 on padding.
    """

    heads: int = 4
    width: int = 64

    @nn.compact
    def __call__(
        self, candidate_BND: jax.Array, past_BHD: jax.Array, rating_BH: jax.Array
    ) -> jax.Array:
        size = self.width // self.heads
        init = nn.initializers.normal(0.1)
        rating = nn.Embed(RATINGS, past_BHD.shape[-1], embedding_init=init, name="rating")
        empty_W = self.param("empty", nn.initializers.zeros_init(), (self.width,))
        mask_BH = rating_BH >= 0
        past_BHD = past_BHD + rating(jnp.maximum(rating_BH, 0))
        query_BNW = nn.Dense(self.width, name="query")(candidate_BND)
        key_value = nn.Dense(2 * self.width, name="key_value")(past_BHD)
        query_BNhd = query_BNW.reshape(*query_BNW.shape[:-1], self.heads, size)
        key_BHhd, value_BHhd = (
            x.reshape(*x.shape[:-1], self.heads, size) for x in jnp.split(key_value, 2, axis=-1)
        )
        score_BhNH = jnp.einsum("bnhd,bkhd->bhnk", query_BNhd, key_BHhd) * size**-0.5
        score_BhNH = jnp.where(mask_BH[:, None, None], score_BhNH, HIDDEN_SCORE)
        weight_BhNH = softmax(score_BhNH)
        found_BNW = jnp.einsum("bhnk,bkhd->bnhd", weight_BhNH, value_BHhd).reshape(query_BNW.shape)
        return jnp.where(mask_BH.any(-1)[:, None, None], found_BNW, empty_W[None, None])
