"""NDCG and average precision of candidate lists, in KAR's convention and the standard one.

Equal scores are averaged over every order of the tied candidates, in closed form: a constant scorer
gets exactly what a random order gets, wherever the positives stand in the list.

| convention   | NDCG without positives | AP@k divides by              | AP without positives |
|--------------|------------------------|------------------------------|----------------------|
| `"kar"`      | 0                      | positives found in the top k | 0                    |
| `"standard"` | NaN: left out          | min(k, positives)            | NaN: left out        |

Take `nanmean` of the standard values; the NaNs count the lists that were left out.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln
from jaxtyping import Bool, Float, Int, Num

Array = jax.Array | np.ndarray
Convention = Literal["kar", "standard"]


@partial(jax.jit, static_argnames="convention")
def ndcg(
    scores: Float[Array, "*batch N"],
    labels: Num[Array, "*batch N"],
    *,
    where: Bool[Array, "*batch N"] | None = None,
    k: int | Int[Array, ""],
    convention: Convention = "kar",
) -> Float[jax.Array, "*batch"]:
    """Normalised discounted cumulative gain at k, gain 2^label - 1, discount log2(1 + position).

    `where` is False on padding; a NaN score ranks lowest. Source: Järvelin and Kekäläinen 2002;
    averaged over ties as McSherry and Najork 2008.
    """
    score_N, label_N, where_N = _prepared(scores, labels, where)
    gain_N = jnp.where(where_N, jnp.exp2(label_N) - 1.0, 0.0)
    above_NN, equal_NN = _compared(score_N, where_N)
    rank_N, tied_N = above_NN.sum(-1), equal_NN.sum(-1)

    position_N = jnp.arange(1, score_N.shape[-1] + 1, dtype=jnp.float32)
    discount_N = jnp.where(position_N <= k, 1.0 / jnp.log2(1.0 + position_N), 0.0)
    # Discounts of positions 1..n summed: a tied group's mean discount is a difference of two.
    summed = jnp.concatenate([jnp.zeros(1), jnp.cumsum(discount_N)])
    mean_discount_N = (summed[rank_N + tied_N] - summed[rank_N]) / jnp.maximum(tied_N, 1)
    dcg = (gain_N * mean_discount_N).sum(-1)

    ideal_N = -jnp.sort(-gain_N, axis=-1)
    ideal = jnp.einsum("...n,n->...", ideal_N, discount_N)
    empty = 0.0 if convention == "kar" else jnp.nan
    return jnp.where(ideal > 0, dcg / jnp.where(ideal > 0, ideal, 1.0), empty)


@partial(jax.jit, static_argnames="convention")
def average_precision(
    scores: Float[Array, "*batch N"],
    labels: Num[Array, "*batch N"],
    *,
    where: Bool[Array, "*batch N"] | None = None,
    k: int | Int[Array, ""],
    convention: Convention = "kar",
) -> Float[jax.Array, "*batch"]:
    """Average precision at k; a label above 0 is a positive.

    KAR divides the precisions at the positives found in the top k by how many were found, so a list
    with one positive on top counts as much as one with four; the standard divides by min(k,
    positives). The mean over tied orders is exact in both: the tied group that k cuts holds a
    hypergeometric number of positives within k, spread evenly.
    """
    score_N, label_N, where_N = _prepared(scores, labels, where)
    positive_N = (label_N > 0) & where_N
    above_NN, equal_NN = _compared(score_N, where_N)
    group_N4 = jnp.stack(
        [
            above_NN.sum(-1),
            equal_NN.sum(-1),
            (above_NN & positive_N[..., None, :]).sum(-1),
            (equal_NN & positive_N[..., None, :]).sum(-1),
        ],
        axis=-1,
    ).astype(jnp.float32)
    # Of the tied group at each position of the ranking: how many stand before it and in it, and
    # how many positives before it and in it.
    order_N = jnp.argsort(jnp.where(where_N, -score_N, jnp.inf), axis=-1)
    group_N4 = jnp.take_along_axis(group_N4, order_N[..., None], axis=-2)
    start_N, size_N, before_N, inside_N = jnp.moveaxis(group_N4, -1, 0)

    position_N = jnp.broadcast_to(
        jnp.arange(1, score_N.shape[-1] + 1, dtype=jnp.float32), start_N.shape
    )
    shown = jnp.minimum(where_N.sum(-1), k)[..., None]
    real_N = position_N <= shown
    # E[positive at p, times precision at p] where the group's positives stand in random order.
    others_N = (position_N - start_N - 1.0) * (inside_N - 1.0) / jnp.maximum(size_N - 1.0, 1.0)
    share_N = inside_N / jnp.maximum(size_N, 1.0)
    expected_N = jnp.where(real_N, share_N * (before_N + 1.0 + others_N) / position_N, 0.0)
    if convention == "standard":
        possible = jnp.minimum(positive_N.sum(-1), k)
        return jnp.where(possible > 0, expected_N.sum(-1) / jnp.maximum(possible, 1), jnp.nan)

    # The same for the last group shown, given that m of its positives fall within its c places.
    last = jnp.maximum(shown - 1, 0)[..., None]
    start, size, before, inside = jnp.moveaxis(jnp.take_along_axis(group_N4, last, -2), -1, 0)
    in_last_N = real_N & (start_N == start)
    whole = jnp.where(in_last_N, 0.0, expected_N).sum(-1, keepdims=True)
    inverse = jnp.where(in_last_N, 1.0 / position_N, 0.0)
    at_first = (before + 1.0) * inverse.sum(-1, keepdims=True)
    later = ((position_N - start - 1.0) * inverse).sum(-1, keepdims=True)
    places = shown - start
    found_M = jnp.concatenate([jnp.zeros_like(position_N[..., :1]), position_N], axis=-1)
    others_M = later * (found_M - 1.0) / jnp.maximum(places - 1.0, 1.0)
    cut_M = found_M / jnp.maximum(places, 1.0) * (at_first + others_M)
    value_M = (whole + cut_M) / jnp.maximum(before + found_M, 1.0)
    return (_hypergeometric(found_M, places, inside, size) * value_M).sum(-1)


def _prepared(
    scores: Array, labels: Array, where: Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    where = jnp.ones(scores.shape, bool) if where is None else jnp.asarray(where)
    scores = jnp.asarray(scores, jnp.float32)
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    return scores, jnp.where(where, labels, 0).astype(jnp.float32), where


def _compared(score_N: jax.Array, where_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., i, j]: real candidate j stands strictly above candidate i; shares its score."""
    other_N, own_N, real_N = score_N[..., None, :], score_N[..., :, None], where_N[..., None, :]
    return (other_N > own_N) & real_N, (other_N == own_N) & real_N


def _hypergeometric(
    found_M: jax.Array, drawn: jax.Array, positives: jax.Array, size: jax.Array
) -> jax.Array:
    """P(found positives among drawn of size, positives of which are positive); sums to 1."""

    def log_choose(n, m):
        m = jnp.clip(m, 0.0, n)
        return gammaln(n + 1.0) - gammaln(m + 1.0) - gammaln(n - m + 1.0)

    possible_M = (found_M <= jnp.minimum(positives, drawn)) & (drawn - found_M <= size - positives)
    log_p_M = log_choose(positives, found_M) + log_choose(size - positives, drawn - found_M)
    return jax.nn.softmax(jnp.where(possible_M, log_p_M, -1e9), axis=-1)
