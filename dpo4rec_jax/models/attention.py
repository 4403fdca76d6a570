"""How tokens of a row see each other: strategies for `llama.apply`, each one pytree.

`Causal` is the plain right-padded row. `Shared` is one prompt with C completions behind it, the
prompt computed once: a DPO pair is C = 2, and ranking all of a user's samples is C = N.

The shared arithmetic is `attend` over one block of keys, and `merge` of several blocks into one
softmax by their log-sum-exp, so blocks may differ in layout and no mask spans what is not computed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from dpo4rec_jax.models import flash, tiles
from dpo4rec_jax.models.flash import Implementation, choose
from dpo4rec_jax.products import summed

__all__ = ["Causal", "Shared", "Block", "Implementation", "attend", "choose", "merge", "visible"]

MASKED = -1e30  # finite, so a row that sees nothing stays finite


class Block(NamedTuple):
    """Softmax over one block of keys before division: values weighted by exp(score - maximum)."""

    out_BTHd: Float[Array, "B T H d"]
    maximum_BTH: Float[Array, "B T H"]
    total_BTH: Float[Array, "B T H"]


def attend(
    query_BTHd: Float[Array, "B T H d"],
    key_BSKd: Float[Array, "B S K d"],
    value_BSKd: Float[Array, "B S K d"],
    mask_BTS: Bool[Array, "#B #T #S"],
) -> Block:
    """One block of scaled dot-product attention, softmax in float32; H / K query heads in a row
    share a key head (repeat-interleave grouping). Rows without a key give zeros and total 0."""
    (B, T, H, d), K = query_BTHd.shape, key_BSKd.shape[2]
    query_BTKGd = query_BTHd.reshape(B, T, K, H // K, d)
    # Output axes in dot_general's own order (batch, lhs, rhs): scores are never transposed.
    score_BKTGS = summed("btkgd,bskd->bktgs", query_BTKGd, key_BSKd) * d**-0.5
    mask_BKTGS = jnp.broadcast_to(mask_BTS[:, None, :, None, :], score_BKTGS.shape)
    score_BKTGS = jnp.where(mask_BKTGS, score_BKTGS, MASKED)
    # The maximum cancels in merge; no gradient through it.
    maximum_BKTG = jax.lax.stop_gradient(score_BKTGS.max(axis=-1))
    weight_BKTGS = jnp.where(mask_BKTGS, jnp.exp(score_BKTGS - maximum_BKTG[..., None]), 0.0)
    out_BKTGd = summed("bktgs,bskd->bktgd", weight_BKTGS.astype(value_BSKd.dtype), value_BSKd)
    return Block(
        out_BTHd=out_BKTGd.transpose(0, 2, 1, 3, 4).reshape(B, T, H, d),
        maximum_BTH=maximum_BKTG.transpose(0, 2, 1, 3).reshape(B, T, H),
        total_BTH=weight_BKTGS.sum(axis=-1).transpose(0, 2, 1, 3).reshape(B, T, H),
    )


def merge(*blocks: Block) -> Float[Array, "B T H d"]:
    """One softmax over the keys of all blocks, float32; rows that see no key at all give zeros."""
    maximum_BTH = blocks[0].maximum_BTH
    for block in blocks[1:]:
        maximum_BTH = jnp.maximum(maximum_BTH, block.maximum_BTH)
    factors = [jnp.exp(block.maximum_BTH - maximum_BTH) for block in blocks]
    total_BTH = sum(block.total_BTH * factor for block, factor in zip(blocks, factors, strict=True))
    out_BTHd = sum(
        block.out_BTHd * factor[..., None] for block, factor in zip(blocks, factors, strict=True)
    )
    safe_BTH = jnp.where(total_BTH > 0, total_BTH, 1.0)
    return out_BTHd / safe_BTH[..., None]


def visible(
    query_position_BT: Int[Array, "B T"],
    key_position_BS: Int[Array, "B S"],
    window: int | None = None,
) -> Bool[Array, "B T S"]:
    """Causal by position, and within the sliding window (a token sees `window` - 1 before it)."""
    distance_BTS = query_position_BT[:, :, None] - key_position_BS[:, None, :]
    mask_BTS = distance_BTS >= 0
    return mask_BTS if window is None else mask_BTS & (distance_BTS < window)


@flax.struct.dataclass
class Causal:
    """Right-padded rows, each token seeing itself and those before it.

    With `keep_kv` the new cache is {"key": L B T K d, "value": ...}, keys rotated: a prefill.
    What padded positions hold is finite and meaningless. `mesh` is what splash runs on.
    """

    length_B: Int[Array, " B"]
    keep_kv: bool = flax.struct.field(pytree_node=False, default=False)
    implementation: Implementation = flax.struct.field(pytree_node=False, default="xla")
    mesh: Mesh | None = flax.struct.field(pytree_node=False, default=None)

    def position_BT(self, num_tokens: int) -> Int[Array, "B T"]:
        """Positions 0, 1, ... of every row."""
        shape_BT = (self.length_B.shape[0], num_tokens)
        return jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32), shape_BT)

    def __call__(
        self,
        query_BTHd: Float[Array, "B T H d"],
        key_BTKd: Float[Array, "B T K d"],
        value_BTKd: Float[Array, "B T K d"],
        position_BT: Int[Array, "B T"],
        cache_layer: Any = None,
        window: int | None = None,
    ) -> tuple[Float[Array, "B T H d"], Any]:
        if self.implementation == "splash":
            T = query_BTHd.shape[1]
            index_T = np.arange(T)
            behind_TT = index_T[:, None] - index_T
            mask_TT = (behind_TT >= 0) & (behind_TT < (window or T))
            segment_BT = jnp.zeros(position_BT.shape, jnp.int32)
            out_BTHd = flash.splash(
                query_BTHd, key_BTKd, value_BTKd, mask_TT, segment_BT, self.mesh
            )
        elif self.implementation == "cudnn":
            out_BTHd = flash.cudnn_causal(query_BTHd, key_BTKd, value_BTKd, window)
        else:
            out_BTHd = causal(query_BTHd, key_BTKd, value_BTKd, position_BT, window)
        kept = {"key": key_BTKd, "value": value_BTKd} if self.keep_kv else None
        return out_BTHd, kept


@flax.struct.dataclass
class Shared:
    """Packed rows [prompt | completion 0 | completion 1 ...], each part padded to its static size.

    The prompt is causal; a completion sees the valid prompt and, causally, itself. Nothing between
    completions is computed. Valid positions equal those of C separate [prompt | completion] rows.
    `mesh` is what splash runs on.

    With `packed_BW` (XLA's attention, no sliding window) a row's completions stand behind each
    other without padding between: C x T indexes their tokens, packed_BW names those that stand
    there, -1 behind the last.
    """

    prompt_length_B: Int[Array, " B"]
    completion_length_BC: Int[Array, "B C"]
    prompt_tokens: int = flax.struct.field(pytree_node=False)
    completions: int = flax.struct.field(pytree_node=False)
    completion_tokens: int = flax.struct.field(pytree_node=False)
    implementation: Implementation = flax.struct.field(pytree_node=False, default="xla")
    mesh: Mesh | None = flax.struct.field(pytree_node=False, default=None)
    packed_BW: Int[Array, "B W"] | None = None

    @property
    def index_BW(self) -> Int[Array, "B W"]:
        """Which of the C x T tokens stand behind the prompt."""
        if self.packed_BW is not None:
            return self.packed_BW
        index_W = jnp.arange(self.completions * self.completion_tokens, dtype=jnp.int32)
        return jnp.broadcast_to(index_W, (self.prompt_length_B.shape[0], len(index_W)))

    def position_BT(self) -> Int[Array, "B T"]:
        """Positions of the packed row: every completion continues where its prompt really ends."""
        B = self.prompt_length_B.shape[0]
        prompt_BT = jnp.broadcast_to(
            jnp.arange(self.prompt_tokens, dtype=jnp.int32), (B, self.prompt_tokens)
        )
        own_BW = self.index_BW % self.completion_tokens
        completion_BW = self.prompt_length_B[:, None] + own_BW
        return jnp.concatenate([prompt_BT, completion_BW.astype(jnp.int32)], axis=1)

    def __call__(
        self,
        query_BTHd: Float[Array, "B T H d"],
        key_BTKd: Float[Array, "B T K d"],
        value_BTKd: Float[Array, "B T K d"],
        position_BT: Int[Array, "B T"],
        cache_layer: Any = None,
        window: int | None = None,
    ) -> tuple[Float[Array, "B T H d"], None]:
        Tp = self.prompt_tokens
        width = Tp + self.index_BW.shape[1]
        assert query_BTHd.shape[1] == width, (query_BTHd.shape, width)
        window = None if window is None or window >= width else window
        packed = self.packed_BW is not None
        assert not packed or (self.implementation == "xla" and window is None), "not packed so"
        if self.implementation == "splash" and window is None:
            return self._splash(query_BTHd, key_BTKd, value_BTKd), None
        if self.implementation == "xla" and window is None:
            out_BTHd = tiles.packed_row(
                query_BTHd,
                key_BTKd,
                value_BTKd,
                self.prompt_length_B,
                prompt_tokens=Tp,
                completions=self.completions,
                part_BW=self.index_BW // self.completion_tokens if packed else None,
            )
            return out_BTHd, None
        prompt = (query_BTHd[:, :Tp], key_BTKd[:, :Tp], value_BTKd[:, :Tp])
        if self.implementation == "cudnn":
            on_prompt = flash.cudnn_causal(*prompt, window)
            completions = self._cudnn(query_BTHd, key_BTKd, value_BTKd, position_BT, window)
        else:
            on_prompt = causal(*prompt, position_BT[:, :Tp], window)
            completions = self._blocks(query_BTHd, key_BTKd, value_BTKd, position_BT, window)
        return jnp.concatenate([on_prompt, completions], axis=1), None

    def _prompt_mask_BTS(self, position_BT: Array, window: int | None) -> Array:
        """What the completions' tokens see of the prompt: its valid part, in the window."""
        Tp = self.prompt_tokens
        valid_BS = jnp.arange(Tp)[None] < self.prompt_length_B[:, None]
        mask_BTS = jnp.broadcast_to(valid_BS[:, None], (*position_BT[:, Tp:].shape, Tp))
        if window is None:
            return mask_BTS
        return mask_BTS & visible(position_BT[:, Tp:], position_BT[:, :Tp], window)

    def _by_completion(self, x_BT: Array) -> Array:
        """The completions' part of the packed row as rows of their own, B x C of them."""
        completions = x_BT[:, self.prompt_tokens :]
        return completions.reshape(-1, self.completion_tokens, *x_BT.shape[2:])

    def _blocks(
        self, query: Array, key: Array, value: Array, position_BT: Array, window: int | None
    ) -> Array:
        Tp = self.prompt_tokens
        mask_BTS = self._prompt_mask_BTS(position_BT, window)
        on_prompt = attend(query[:, Tp:], key[:, :Tp], value[:, :Tp], mask_BTS)
        own_query, own_key, own_value, own_position = map(
            self._by_completion, (query, key, value, position_BT)
        )
        own_mask = visible(own_position, own_position, window)
        on_self = attend(own_query, own_key, own_value, own_mask)
        packed = (on_prompt.maximum_BTH.shape[0], -1)
        on_self = Block(*(x.reshape(*packed, *x.shape[2:]) for x in on_self))
        return merge(on_prompt, on_self).astype(query.dtype)

    def _cudnn(
        self, query: Array, key: Array, value: Array, position_BT: Array, window: int | None
    ) -> Array:
        """Each completion a row whose keys are [prompt | its own], under an explicit mask."""
        Tp, C, Tc = self.prompt_tokens, self.completions, self.completion_tokens
        mask_BTS = self._prompt_mask_BTS(position_BT, window).reshape(-1, Tc, Tp)
        own_position = self._by_completion(position_BT)
        mask_BTS = jnp.concatenate([mask_BTS, visible(own_position, own_position, window)], axis=2)
        keys, values = (
            jnp.concatenate([jnp.repeat(x[:, :Tp], C, axis=0), self._by_completion(x)], axis=1)
            for x in (key, value)
        )
        out = flash.cudnn_masked(self._by_completion(query), keys, values, mask_BTS)
        return out.reshape(query.shape[0], C * Tc, *query.shape[2:])

    def _splash(self, query: Array, key: Array, value: Array) -> Array:
        """The packed row at once; a prompt's padding is a segment that nobody else sees."""
        Tp, C, Tc = self.prompt_tokens, self.completions, self.completion_tokens
        part_T = np.concatenate([np.zeros(Tp, int), 1 + np.repeat(np.arange(C), Tc)])
        causal_TT = np.tri(len(part_T), dtype=bool)
        mask_TT = causal_TT & ((part_T == part_T[:, None]) | (part_T == 0))
        index_T = jnp.arange(len(part_T))[None]
        padding_BT = (index_T >= self.prompt_length_B[:, None]) & (index_T < Tp)
        segment_BT = padding_BT.astype(jnp.int32)
        return flash.splash(query, key, value, mask_TT, segment_BT, self.mesh)


def causal(
    query_BTHd: Float[Array, "B T H d"],
    key_BTKd: Float[Array, "B T K d"],
    value_BTKd: Float[Array, "B T K d"],
    position_BT: Int[Array, "B T"],
    window: int | None = None,
) -> Float[Array, "B T H d"]:
    """Self-attention of rows whose positions rise one by one."""
    mask_BTS = visible(position_BT, position_BT, window)
    return merge(attend(query_BTHd, key_BTKd, value_BTKd, mask_BTS)).astype(query_BTHd.dtype)
