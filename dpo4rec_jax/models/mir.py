"""MIR (Xi et al. 2022, arXiv 2204.09370): the candidates, a set, meet the user's history, a list.

Reordering the candidates reorders their scores, as in the paper. KAR's code of it weighs places of
the list, which ties scores to places; here a weight comes from what stands there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpo4rec_jax.models.backbones import Window
from dpo4rec_jax.models.dlcm import GRU
from dpo4rec_jax.models.list_attention import HIDDEN_SCORE, Attention, LayerNorm, dropout, softmax


class SetToList(nn.Module):
    """The paper's SLAttention: affinity of every candidate with everything in the history, as whole
    vectors and by their fields, weaker by age at a rate that is the user's own.

    Returns for each candidate what it found in the history, and the candidates seen as it sees it.
    """

    fields: int = 4

    @nn.compact
    def __call__(
        self, set_BND: jax.Array, list_BHD: jax.Array, mask_BN: jax.Array, mask_BH: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        width, fields = set_BND.shape[-1], self.fields
        scale = width**-0.5
        whole_BNH = jnp.einsum("bnd,bhd->bnh", nn.Dense(width, name="whole")(set_BND), list_BHD)
        set_BNFd = set_BND.reshape(*set_BND.shape[:-1], fields, width // fields)
        list_BHFd = list_BHD.reshape(*list_BHD.shape[:-1], fields, width // fields)
        pair_FG = self.param("fields", nn.initializers.normal(fields**-1), (fields, fields))
        moved_BNFd = nn.Dense(width // fields, use_bias=False, name="by_field")(set_BNFd)
        parts_BNH = jnp.einsum("bnfd,bhgd,fg->bnh", moved_BNFd, list_BHFd, pair_FG)
        affinity_BNH = jnp.tanh((whole_BNH + parts_BNH) * scale)

        count_B1 = mask_BH.sum(-1, keepdims=True)
        mean_BD = (list_BHD * mask_BH[..., None]).sum(1) / jnp.maximum(count_B1, 1)
        rate_B1 = nn.softplus(nn.Dense(1, name="decay")(mean_BD) - 2.0)
        age_BH = jnp.maximum(count_B1 - 1 - jnp.arange(mask_BH.shape[1])[None], 0)
        kept_BNH = affinity_BNH * jnp.exp(-rate_B1 * age_BH)[:, None] * mask_BH[:, None]

        from_set = nn.Dense(width, name="from_set")(set_BND)
        from_list = nn.Dense(width, name="from_list")(list_BHD)
        found_BND = jnp.tanh(from_set + jnp.einsum("bnh,bhd->bnd", kept_BNH, from_list))
        weight_BNH = _weights(jnp.einsum("bnd,bhd->bnh", found_BND, from_list) * scale, mask_BH)
        weight_BNN = _weights(jnp.einsum("bnd,bmd->bnm", found_BND, from_set) * scale, mask_BN)
        in_list_BND = jnp.einsum("bnh,bhd->bnd", weight_BNH, list_BHD)
        return in_list_BND, jnp.einsum("bnm,bmd->bnd", weight_BNN, set_BND)


class MIR(nn.Module):
    """Self-attention within the set, a GRU within the list, attention between, a perceptron."""

    dropout: float = 0.0
    width: int = 64
    heads: int = 2
    hidden: tuple[int, ...] = (200, 80)
    reads_history = True

    @nn.compact
    def __call__(
        self, x_BND: jax.Array, mask_BN: jax.Array, training: bool, window: Window
    ) -> jax.Array:
        drop = dropout(self.dropout, training)
        x_BND = nn.Dense(self.width, name="candidate")(LayerNorm()(x_BND))
        past_BHD = nn.Dense(self.width, name="past")(LayerNorm()(window.item_BHD))
        set_BND = x_BND + Attention(self.heads, name="within_set")(x_BND, x_BND, mask_BN)
        reader = GRU(self.width, name="within_list")
        read_HBD, _ = reader(past_BHD.swapaxes(0, 1), window.mask_BH.T)
        list_BHD = past_BHD + read_HBD.swapaxes(0, 1)
        crossed = SetToList(name="between")(set_BND, list_BHD, mask_BN, window.mask_BH)
        h_BND = LayerNorm()(jnp.concatenate([x_BND, set_BND, *crossed], axis=-1))
        for i, size in enumerate(self.hidden):
            h_BND = drop(nn.relu(nn.Dense(size, name=f"hidden_{i}")(h_BND)))
        return nn.Dense(1, name="score")(h_BND)[..., 0]


def _weights(score_BNS: jax.Array, mask_BS: jax.Array) -> jax.Array:
    """Softmax over what is real; all zero where nothing is."""
    score_BNS = jnp.where(mask_BS[:, None], score_BNS, HIDDEN_SCORE)
    return softmax(score_BNS) * mask_BS[:, None]
