"""Attention of packed rows in tiles, with a gradient of its own: plain XLA, on any device.

A tile is a run of queries against the keys before it, which all of them see, and its own, which
they see causally. What a causal or a shared mask hides is then hardly computed, and only a tile's
own square is masked at all. The backward pass recomputes a tile's probabilities from the
log-sum-exp that the forward pass kept (Dao et al. 2022, arXiv 2205.14135), with keys as rows and
the queries' gradient by columns: so arranged, what is transposed of its five products' operands and
results is the features of a token, never the probabilities, which are some times as large.

Axes beside the package's legend: G query heads that share a key head, Q = G x T the queries of a
tile, head by head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dpo4rec_jax.models.row_sums import row_sums
from dpo4rec_jax.products import summed

MASKED = -1e30  # finite, so arithmetic on it stays finite
KEPT = "attention"  # the name of what the backward pass needs, for rematerialisation policies
PROMPT_TILE = 128
MOST_PROMPT_TILES = 8  # each is a part of the program


class Before(NamedTuple):
    """Keys and values that stand before all queries of a tile; `seen_BS` None: all are real."""

    key_BKSd: Float[Array, "B K S d"]
    value_BKSd: Float[Array, "B K S d"]
    seen_BS: Bool[Array, "B S"] | None


def packed_row(
    query_BTHd: Float[Array, "B T H d"],
    key_BTKd: Float[Array, "B T K d"],
    value_BTKd: Float[Array, "B T K d"],
    prompt_length_B: Int[Array, " B"],
    *,
    prompt_tokens: int,
    completions: int,
    part_BW: Int[Array, "B W"] | None = None,
) -> Float[Array, "B T H d"]:
    """Rows [prompt | completion 0 | ...]: a causal prompt, and completions that see the valid
    prompt and, causally, themselves. Softmax in float32; H / K query heads in a row share a key
    head. Padded positions are finite and meaningless.

    The completions are of one padded length, or, as `part_BW` says of each token behind the prompt,
    of the lengths that they have."""
    key_BK1Td, value_BK1Td = _by_head(key_BTKd, 1), _by_head(value_BTKd, 1)
    outs = []
    tokens = _tile_tokens(prompt_tokens)
    for start in range(0, prompt_tokens, tokens):
        stop = min(start + tokens, prompt_tokens)
        before = Before(key_BK1Td[:, :, 0, :start], value_BK1Td[:, :, 0, :start], None)
        own = key_BK1Td[:, :, :, start:stop], value_BK1Td[:, :, :, start:stop]
        outs.append(_tile(query_BTHd[:, start:stop], before if start else None, *own))
    if completions:
        seen_BS = jnp.arange(prompt_tokens)[None] < prompt_length_B[:, None]
        before = Before(
            key_BK1Td[:, :, 0, :prompt_tokens], value_BK1Td[:, :, 0, :prompt_tokens], seen_BS
        )
        count = completions if part_BW is None else 1
        key, value = (_by_head(x[:, prompt_tokens:], count) for x in (key_BTKd, value_BTKd))
        outs.append(_tile(query_BTHd[:, prompt_tokens:], before, key, value, part_BW))
    return jnp.concatenate(outs, axis=1)


def _tile_tokens(prompt_tokens: int) -> int:
    """Tokens of a prompt's tiles: a few tiles whatever the prompt."""
    fewest = -(-prompt_tokens // MOST_PROMPT_TILES)
    return max(PROMPT_TILE, -(-fewest // PROMPT_TILE) * PROMPT_TILE)


def _by_head(x_BTKd: Array, completions: int) -> Array:
    """B, C x T, K, d -> B, K, C, T, d."""
    B, tokens, K, d = x_BTKd.shape
    x_BCTKd = x_BTKd.reshape(B, completions, tokens // completions, K, d)
    return x_BCTKd.transpose(0, 3, 1, 2, 4)


def _tile(
    query_BTHd: Array,
    before: Before | None,
    key_BKCTd: Array,
    value_BKCTd: Array,
    part_BT: Array | None = None,
) -> Array:
    B, K, C, T, d = key_BKCTd.shape
    G = query_BTHd.shape[2] // K
    query_BCTKGd = query_BTHd.reshape(B, C, T, K, G, d)
    query_BKCQd = query_BCTKGd.transpose(0, 3, 1, 4, 2, 5).reshape(B, K, C, G * T, d)
    out_BKCQd = _attend(query_BKCQd, before, key_BKCTd, value_BKCTd, part_BT)
    out_BCTKGd = out_BKCQd.reshape(B, K, C, G, T, d).transpose(0, 2, 4, 1, 3, 5)
    return out_BCTKGd.reshape(query_BTHd.shape).astype(query_BTHd.dtype)


@jax.custom_vjp
def _attend(
    query_BKCQd: Array,
    before: Before | None,
    key_BKCTd: Array,
    value_BKCTd: Array,
    part_BT: Array | None,
) -> Array:
    return _forward(query_BKCQd, before, key_BKCTd, value_BKCTd, part_BT)[0]


def _forward(
    query_BKCQd: Array,
    before: Before | None,
    key_BKCTd: Array,
    value_BKCTd: Array,
    part_BT: Array | None,
) -> tuple[Array, Any]:
    scaled_BKCQd = query_BKCQd * query_BKCQd.shape[-1] ** -0.5
    own_BKCQT = summed("bkcqd,bkctd->bkcqt", scaled_BKCQd, key_BKCTd)
    own_BKCQT = jnp.where(_causal(own_BKCQT.shape, part_BT), own_BKCQT, MASKED)
    maximum_BKCQ = own_BKCQT.max(axis=-1)
    earlier_BKCQS = None
    if before is not None:
        earlier_BKCQS = summed("bkcqd,bksd->bkcqs", scaled_BKCQd, before.key_BKSd)
        if before.seen_BS is not None:
            earlier_BKCQS += _bias(before.seen_BS)[:, None, None, None]
        maximum_BKCQ = jnp.maximum(maximum_BKCQ, earlier_BKCQS.max(axis=-1))
    weight_BKCQT = jnp.exp(own_BKCQT - maximum_BKCQ[..., None])
    total_BKCQ = weight_BKCQT.sum(axis=-1)
    out_BKCQd = _weighted("bkcqt,bkctd->bkcqd", weight_BKCQT, value_BKCTd)
    if before is not None:
        assert earlier_BKCQS is not None
        weight_BKCQS = jnp.exp(earlier_BKCQS - maximum_BKCQ[..., None])
        total_BKCQ += weight_BKCQS.sum(axis=-1)
        out_BKCQd += _weighted("bkcqs,bksd->bkcqd", weight_BKCQS, before.value_BKSd)
    out_BKCQd = checkpoint_name(out_BKCQd / total_BKCQ[..., None], KEPT)
    logz_BKCQ = checkpoint_name(maximum_BKCQ + jnp.log(total_BKCQ), KEPT)
    return out_BKCQd, (scaled_BKCQd, before, key_BKCTd, value_BKCTd, part_BT, out_BKCQd, logz_BKCQ)


def _backward(
    residuals: Any, cotangent_BKCQd: Array
) -> tuple[Array, Before | None, Array, Array, None]:
    scaled_BKCQd, before, key_BKCTd, value_BKCTd, part_BT, out_BKCQd, logz_BKCQ = residuals
    delta_BKCQ = row_sums(cotangent_BKCQd * out_BKCQd)[..., 0]
    cotangent_BKCQd = cotangent_BKCQd.astype(value_BKCTd.dtype)

    score_BKCTQ = summed("bkctd,bkcqd->bkctq", key_BKCTd, scaled_BKCQd)
    seen_BKCQT = _causal((*score_BKCTQ.shape[:3], *score_BKCTQ.shape[:2:-1]), part_BT)
    score_BKCTQ = jnp.where(seen_BKCQT.swapaxes(-1, -2), score_BKCTQ, MASKED)
    weight_BKCTQ = jnp.exp(score_BKCTQ - logz_BKCQ[..., None, :])
    slope_BKCTQ = summed("bkctd,bkcqd->bkctq", value_BKCTd, cotangent_BKCQd)
    slope_BKCTQ = weight_BKCTQ * (slope_BKCTQ - delta_BKCQ[..., None, :])
    by_value_BKCTd = _weighted("bkctq,bkcqd->bkctd", weight_BKCTQ, cotangent_BKCQd)
    by_key_BKCTd = _weighted("bkctq,bkcqd->bkctd", slope_BKCTQ, scaled_BKCQd)
    by_query_BKCdQ = _weighted("bkctd,bkctq->bkcdq", key_BKCTd, slope_BKCTQ)

    by_before = None
    if before is not None:
        score_BKSCQ = summed("bksd,bkcqd->bkscq", before.key_BKSd, scaled_BKCQd)
        if before.seen_BS is not None:
            score_BKSCQ += _bias(before.seen_BS)[:, None, :, None, None]
        weight_BKSCQ = jnp.exp(score_BKSCQ - logz_BKCQ[:, :, None])
        slope_BKSCQ = summed("bksd,bkcqd->bkscq", before.value_BKSd, cotangent_BKCQd)
        slope_BKSCQ = weight_BKSCQ * (slope_BKSCQ - delta_BKCQ[:, :, None])
        by_value_BKSd = _weighted("bkscq,bkcqd->bksd", weight_BKSCQ, cotangent_BKCQd)
        by_key_BKSd = _weighted("bkscq,bkcqd->bksd", slope_BKSCQ, scaled_BKCQd)
        by_earlier_BKdCQ = _weighted("bksd,bkscq->bkdcq", before.key_BKSd, slope_BKSCQ)
        by_query_BKCdQ += by_earlier_BKdCQ.swapaxes(2, 3)
        by_before = Before(_as(before.key_BKSd, by_key_BKSd), _as(value_BKCTd, by_value_BKSd), None)
    by_query_BKCQd = by_query_BKCdQ.swapaxes(3, 4) * scaled_BKCQd.shape[-1] ** -0.5
    return (
        _as(scaled_BKCQd, by_query_BKCQd),
        by_before,
        _as(key_BKCTd, by_key_BKCTd),
        _as(value_BKCTd, by_value_BKCTd),
        None,
    )


_attend.defvjp(_forward, _backward)


def _as(like: Array, gradient: Array) -> Array:
    return gradient.astype(like.dtype)


def _causal(shape_BKCQT: tuple[int, ...], part_BT: Array | None) -> Array:
    """True where a query's token, T of them for each head of the group, is not before the key, and
    of the same part."""
    *_, queries, tokens = shape_BKCQT
    heads = queries // tokens
    if part_BT is None:
        seen_QT = np.tile(np.tri(tokens, dtype=bool), (heads, 1))
        return jnp.broadcast_to(jnp.asarray(seen_QT), shape_BKCQT)
    seen_BTT = (part_BT[:, :, None] == part_BT[:, None, :]) & np.tri(tokens, dtype=bool)[None]
    seen_BQT = jnp.tile(seen_BTT, (1, heads, 1))
    return jnp.broadcast_to(seen_BQT[:, None, None], shape_BKCQT)


def _bias(seen: Array) -> Array:
    return jnp.where(seen, 0.0, MASKED)


def _weighted(spec: str, weight: Array, values: Array) -> Array:
    """Of factors in one dtype, the narrower of the two."""
    dtype = min(weight.dtype, values.dtype, key=lambda one: one.itemsize)
    return summed(spec, weight.astype(dtype), values.astype(dtype))
