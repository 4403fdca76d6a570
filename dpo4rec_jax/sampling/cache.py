"""Keys and values of sampling, and how prompts and completions attend to them.

A prompt is kept once and shared by all of its completions; a completion (a row) owns only what it
has written itself. With K key heads of size d a layer holds

    prefix  G prompts x S tokens        suffix  B rows x T tokens

so memory is prompts x prompt length + rows x new tokens, never rows x both. Axes beside the
package's legend: X shards of the data axis (each with rows and prompts of its own, so no index
crosses a device), B rows and G prompts of a shard, W lanes of a prompt, Q query heads that share
a key head, J prefill jobs of a shard, S prompt tokens, T completion tokens (of a prefill: tokens
of the chunk).

Rows come and go singly, so at any time a prompt has any W or fewer of the rows, in any slots.
Attention to the prefix therefore brings the queries (small) to their prompt's lanes, multiplies
once a prompt, and brings the results back: the keys (large) are read where they lie, once.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpo4rec_jax.models.attention import MASKED, Block, merge
from dpo4rec_jax.products import summed


@flax.struct.dataclass
class KeyValues:
    """One layer's keys, tokens last, and values, tokens before features: both products of
    attention read them as they lie."""

    key_XGKdS: Float[Array, "X G K d S"]
    value_XGKSd: Float[Array, "X G K S d"]

    @classmethod
    def zeros(
        cls, shards: int, owners: int, kv_heads: int, tokens: int, head_dim: int, dtype: str
    ) -> KeyValues:
        shape = (shards, owners, kv_heads)
        return cls(
            key_XGKdS=jnp.zeros((*shape, head_dim, tokens), dtype),
            value_XGKSd=jnp.zeros((*shape, tokens, head_dim), dtype),
        )


@flax.struct.dataclass
class Prefill:
    """Attention of one chunk of each job's prompt: writes its keys and values into the prompt's
    prefix, then attends to the prefix causally. Where `valid_XJ` is False nothing is written.

    A job is (slot of the prompt, tokens of it that are in the prefix already). The cache of a
    layer is its prefix `KeyValues`.
    """

    slot_XJ: Int[Array, "X J"]
    offset_XJ: Int[Array, "X J"]
    valid_XJ: Bool[Array, "X J"]

    def __call__(
        self,
        query_BTHd: Float[Array, "B T H d"],
        key_BTKd: Float[Array, "B T K d"],
        value_BTKd: Float[Array, "B T K d"],
        position_BT: Int[Array, "B T"],
        cache_layer: KeyValues,
        window: int | None = None,
    ) -> tuple[Float[Array, "B T H d"], KeyValues]:
        (X, J), (_, T, K, d) = self.slot_XJ.shape, key_BTKd.shape
        key_XJKdT = key_BTKd.reshape(X, J, T, K, d).transpose(0, 1, 3, 4, 2)
        value_XJKTd = value_BTKd.reshape(X, J, T, K, d).transpose(0, 1, 3, 2, 4)
        prefix = KeyValues(
            key_XGKdS=jax.vmap(self._write_keys)(
                cache_layer.key_XGKdS, key_XJKdT, self.slot_XJ, self.offset_XJ, self.valid_XJ
            ),
            value_XGKSd=jax.vmap(self._write_values)(
                cache_layer.value_XGKSd, value_XJKTd, self.slot_XJ, self.offset_XJ, self.valid_XJ
            ),
        )
        own = jax.vmap(lambda cache, slot_J: cache[slot_J])
        own_key_XJKdS = own(prefix.key_XGKdS, self.slot_XJ)
        own_value_XJKSd = own(prefix.value_XGKSd, self.slot_XJ)

        query_XJKTQd = query_BTHd.reshape(X, J, T, K, -1, d).transpose(0, 1, 3, 2, 4, 5)
        S = own_key_XJKdS.shape[-1]
        distance_XJTS = position_BT.reshape(X, J, T, 1) - jnp.arange(S)[None, None, None]
        mask_XJTS = distance_XJTS >= 0
        if window is not None:
            mask_XJTS &= distance_XJTS < window
        out, _, total = _softmax_block(
            "xjktqd,xjkds->xjktqs",
            "xjktqs,xjksd->xjktqd",
            query_XJKTQd,
            own_key_XJKdS,
            own_value_XJKSd,
            mask_XJTS[:, :, None, :, None],
        )
        out_XJKTQd = (out / total[..., None]).astype(query_BTHd.dtype)
        return out_XJKTQd.transpose(0, 1, 3, 2, 4, 5).reshape(query_BTHd.shape), prefix

    @staticmethod
    def _write_keys(cache_GKdS, new_JKdT, slot_J, offset_J, valid_J):
        if len(slot_J) == 1:
            return _write(cache_GKdS, new_JKdT, (slot_J[0], 0, 0, offset_J[0]), valid_J[0])
        slot_J1, index_JT = _scattered(cache_GKdS, new_JKdT.shape[-1], slot_J, offset_J, valid_J)
        new_JTKd = new_JKdT.transpose(0, 3, 1, 2)
        return cache_GKdS.at[slot_J1, :, :, index_JT].set(new_JTKd, mode="drop")

    @staticmethod
    def _write_values(cache_GKSd, new_JKTd, slot_J, offset_J, valid_J):
        if len(slot_J) == 1:
            return _write(cache_GKSd, new_JKTd, (slot_J[0], 0, offset_J[0], 0), valid_J[0])
        slot_J1, index_JT = _scattered(cache_GKSd, new_JKTd.shape[-2], slot_J, offset_J, valid_J)
        return cache_GKSd.at[slot_J1, :, index_JT].set(new_JKTd.transpose(0, 2, 1, 3), mode="drop")


@flax.struct.dataclass
class Decode:
    """Attention of one new token a row: to its prompt's prefix, and to the row's own suffix, which
    the token joins first. One softmax over both, merged by log-sum-exp.

    `row_of_lane_XL` names the row in each lane (L = G x W; lanes without a row name any), and
    `lane_of_row_XB` the way back. `suffix_length_XB` counts the tokens a row wrote before this one.
    The cache of a layer is (prefix, suffix), what comes back is the suffix.
    """

    row_of_lane_XL: Int[Array, "X L"]
    lane_of_row_XB: Int[Array, "X B"]
    prefix_length_XG: Int[Array, "X G"]
    suffix_length_XB: Int[Array, "X B"]

    def __call__(
        self,
        query_BTHd: Float[Array, "XB 1 H d"],
        key_BTKd: Float[Array, "XB 1 K d"],
        value_BTKd: Float[Array, "XB 1 K d"],
        position_BT: Int[Array, "XB 1"],
        cache_layer: tuple[KeyValues, KeyValues],
        window: int | None = None,
    ) -> tuple[Float[Array, "XB 1 H d"], KeyValues]:
        (X, B), (K, d) = self.lane_of_row_XB.shape, key_BTKd.shape[2:]
        prefix, suffix = cache_layer
        suffix = KeyValues(
            key_XGKdS=jax.vmap(_append_key)(
                suffix.key_XGKdS, key_BTKd.reshape(X, B, K, d), self.suffix_length_XB
            ),
            value_XGKSd=jax.vmap(_append_value)(
                suffix.value_XGKSd, value_BTKd.reshape(X, B, K, d), self.suffix_length_XB
            ),
        )
        query_XBKQd = query_BTHd.reshape(X, B, K, -1, d)
        position_XB = position_BT.reshape(X, B)
        shared = self._on_prefix(query_XBKQd, position_XB, prefix, window)
        own = self._on_suffix(query_XBKQd, suffix, window)
        return merge(shared, own).astype(query_BTHd.dtype), suffix

    def _on_prefix(
        self, query_XBKQd: Array, position_XB: Array, prefix: KeyValues, window: int | None
    ) -> Block:
        (X, B, K, Q, d), G = query_XBKQd.shape, prefix.key_XGKdS.shape[1]
        S, W = prefix.key_XGKdS.shape[-1], self.row_of_lane_XL.shape[1] // G
        to_lanes = jax.vmap(lambda x_B, row_L: x_B[row_L])
        query_XGWKQd = to_lanes(query_XBKQd, self.row_of_lane_XL).reshape(X, G, W, K, Q, d)
        index_111S = jnp.arange(S)[None, None, None]
        mask_XGWS = index_111S < self.prefix_length_XG[..., None, None]
        if window is not None:
            position_XGW1 = to_lanes(position_XB, self.row_of_lane_XL).reshape(X, G, W, 1)
            mask_XGWS = mask_XGWS & (position_XGW1 - index_111S < window)
        out_XGKWQd, maximum_XGKWQ, total_XGKWQ = _softmax_block(
            "xgkwqd,xgkds->xgkwqs",
            "xgkwqs,xgksd->xgkwqd",
            query_XGWKQd.transpose(0, 1, 3, 2, 4, 5),
            prefix.key_XGKdS,
            prefix.value_XGKSd,
            mask_XGWS[:, :, None, :, None],
        )

        def to_rows(x_XGKWQ: Array) -> Array:
            x_XGWKQ = jnp.moveaxis(x_XGKWQ, 2, 3)
            x_XLKQ = x_XGWKQ.reshape(X, G * W, *x_XGWKQ.shape[3:])
            x_XBKQ = jax.vmap(lambda x_L, lane_B: x_L[lane_B])(x_XLKQ, self.lane_of_row_XB)
            return x_XBKQ.reshape(X * B, 1, K * Q, *x_XBKQ.shape[4:])

        return Block(to_rows(out_XGKWQd), to_rows(maximum_XGKWQ), to_rows(total_XGKWQ))

    def _on_suffix(self, query_XBKQd: Array, suffix: KeyValues, window: int | None) -> Block:
        X, B, K, Q, _ = query_XBKQd.shape
        index_11T = jnp.arange(suffix.key_XGKdS.shape[-1])[None, None]
        age_XBT = self.suffix_length_XB[..., None] - index_11T  # 0: this token itself
        mask_XBT = age_XBT >= 0
        if window is not None:
            mask_XBT &= age_XBT < window
        block = _softmax_block(
            "xbkqd,xbkdt->xbkqt",
            "xbkqt,xbktd->xbkqd",
            query_XBKQd,
            suffix.key_XGKdS,
            suffix.value_XGKSd,
            mask_XBT[:, :, None, None],
        )
        return Block(*(part.reshape(X * B, 1, K * Q, *part.shape[4:]) for part in block))


def _softmax_block(
    to_scores: str, to_out: str, query: Array, key: Array, value: Array, mask: Array
) -> tuple[Array, Array, Array]:
    """(values weighted by exp(score - maximum), maximum, total), float32; the tokens' axis last."""
    score = summed(to_scores, query, key) * query.shape[-1] ** -0.5
    score = jnp.where(jnp.broadcast_to(mask, score.shape), score, MASKED)
    maximum = score.max(axis=-1, keepdims=True)
    # Against a maximum above MASKED a masked score's exponential is exactly zero. Where nothing is
    # visible the block's weights are ones: merge then scales them by exp(MASKED - other) = 0.
    weight = jnp.exp(score - maximum)
    out = summed(to_out, weight.astype(value.dtype), value)
    return out, maximum[..., 0], weight.sum(axis=-1)


def _write(cache: Array, new: Array, start: tuple, valid: Array) -> Array:
    held = jax.lax.dynamic_slice(cache, start, new.shape)
    return jax.lax.dynamic_update_slice(cache, jnp.where(valid, new, held), start)


def _scattered(
    cache_G: Array, num_tokens: int, slot_J: Array, offset_J: Array, valid_J: Array
) -> tuple[Array, Array]:
    """Where the chunks of several jobs go, by slot and token; a slice for each would take a GPU's
    compiler a minute."""
    slot_J = jnp.where(valid_J, slot_J, len(cache_G))  # beyond: dropped
    return slot_J[:, None], offset_J[:, None] + jnp.arange(num_tokens)[None]


def _append_key(cache_BKdT: Array, new_BKd: Array, length_B: Array) -> Array:
    return _append(cache_BKdT, new_BKd, length_B, axis=3)


def _append_value(cache_BKTd: Array, new_BKd: Array, length_B: Array) -> Array:
    return _append(cache_BKTd, new_BKd, length_B, axis=2)


def _append(cache_B: Array, new_B: Array, length_B: Array, axis: int) -> Array:
    """Each row's token put behind the row's others, which lie along `axis`; dropped beyond them."""

    def scattered(cache_B: Array, new_B: Array) -> Array:
        row_B = jnp.arange(len(cache_B))
        index = (row_B, *(slice(None),) * (axis - 1), length_B)
        return cache_B.at[index].set(new_B, mode="drop")

    def selected(cache_B: Array, new_B: Array) -> Array:
        index = jax.lax.broadcasted_iota(jnp.int32, cache_B.shape, axis)
        here = index == jnp.expand_dims(length_B, range(1, cache_B.ndim))
        return jnp.where(here, jnp.expand_dims(new_B, axis), cache_B)

    if cache_B.dtype != jnp.bfloat16:
        return scattered(cache_B, new_B)
    # To scatter, XLA for CPUs converts all of a bfloat16 cache to float32 and back.
    return jax.lax.platform_dependent(cache_B, new_B, cpu=selected, default=scattered)
