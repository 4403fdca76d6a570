"""What a user's window says about a candidate: attention from the candidate to what he rated.

An option: neither PRM nor DLCM sees the history in KAR. The embeddings are those of the candidates,
so similar tastes are found by the same vectors that tell items apart.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

RATINGS = 6  # embeddings of ratings: none, and 1 to 5 stars
HIDDEN_SCORE = -1e9


class TargetAttention(nn.Module):
    """Zhou et al. 2018 (DIN), with dot products: for each candidate a mean of what was rated, and
    of how, weighted by similarity; one learned vector where the window is empty.

    `rating_BH` holds stars rounded to 1..5, 0 where there is none, and -1 on padding.
    """

    @nn.compact
    def __call__(self, item_BND: jax.Array, past_BHD: jax.Array, rating_BH: jax.Array) -> jax.Array:
        width = item_BND.shape[-1]
        init = nn.initializers.normal(0.1)
        rating = nn.Embed(RATINGS, width, embedding_init=init, name="rating")
        empty_D = self.param("empty", nn.initializers.zeros_init(), (width,))
        mask_BH = rating_BH >= 0
        value_BHD = past_BHD + rating(jnp.maximum(rating_BH, 0))
        query_BND = nn.Dense(width, name="query")(item_BND)
        score_BNH = jnp.einsum("bnd,bhd->bnh", query_BND, past_BHD)
        score_BNH = jnp.where(mask_BH[:, None], score_BNH, HIDDEN_SCORE)
        weight_BNH = nn.softmax(score_BNH, axis=-1)
        found_BND = jnp.einsum("bnh,bhd->bnd", weight_BNH, value_BHD)
        return jnp.where(mask_BH.any(-1)[:, None, None], found_BND, empty_D[None, None])
