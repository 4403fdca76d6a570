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
from jaxtyping import Bool, Float, Num

Array = jax.Array | np.ndarray
Convention = Literal["kar", "standard"]


@partial(jax.jit, static_argnames=("k", "convention"))
def ndcg(
    scores: Float[Array, "*batch N"],
    labels: Num[Array, "*batch N"],
    *,
    where: Bool[Array, "*batch N"] | None = None,
    k: int,
    convention: Convention = "kar",
) -> Float[jax.Array, "*batch"]:
    """Normalised discounted cumulative gain at k, gain 2^label - 1, discount log2(1 + position).

    `where` is False on padding; a NaN score ranks lowest. Source: Järvelin and Kekäläinen 2002;
    averaged over ties as McSherry and Najork 2008.
    """
    score_N, label_N, where_N = _prepared(scores, labels, where)
    gain_N = jnp.where(where_N, jnp.exp2(label_N) - 1.0, 0.0)
    rank_N, tied_N = _rank_and_ties(score_N, where_N)

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


@partial(jax.jit, static_argnames=("k", "convention"))
def average_precision(
    scores: Float[Array, "*batch N"],
    labels: Num[Array, "*batch N"],
    *,
    where: Bool[Array, "*batch N"] | None = None,
    k: int,
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
    num_positives = positive_N.sum(-1)
    rank_N, tied_N = _rank_and_ties(score_N, where_N)
    above_NN = _above(score_N, where_N)
    equal_NN = _equal(score_N, where_N)
    hits_above_N = (above_NN & positive_N[..., None, :]).sum(-1)
    hits_tied_N = (equal_NN & positive_N[..., None, :]).sum(-1)

    depth = min(k, score_N.shape[-1])
    order_K = jnp.argsort(jnp.where(where_N, -score_N, jnp.inf), axis=-1)[..., :depth]
    start_K, size_K, before_K, inside_K = (
        jnp.take_along_axis(x_N, order_K, axis=-1).astype(jnp.float32)
        for x_N in (rank_N, tied_N, hits_above_N, hits_tied_N)
    )
    shown = jnp.minimum(where_N.sum(-1), depth)
    position_K = jnp.broadcast_to(jnp.arange(1, depth + 1, dtype=jnp.float32), start_K.shape)
    real_K = position_K <= shown[..., None]
    if convention == "standard":
        expected_K = _expected_precision(position_K, start_K, size_K, before_K, inside_K)
        total = jnp.where(real_K, expected_K, 0.0).sum(-1)
        possible = jnp.minimum(num_positives, k)
        return jnp.where(possible > 0, total / jnp.maximum(possible, 1), jnp.nan)

    last = jnp.maximum(shown - 1, 0)[..., None]
    start, size, before, inside = (
        jnp.take_along_axis(x_K, last, axis=-1) for x_K in (start_K, size_K, before_K, inside_K)
    )
    slots = shown[..., None] - start  # of the last group, how many stand within k
    in_last_K = start_K == start
    whole_K = _expected_precision(position_K, start_K, size_K, before_K, inside_K)
    whole = jnp.where(real_K & ~in_last_K, whole_K, 0.0).sum(-1)
    # axis M: how many positives of the last group fall within k
    found_M = jnp.broadcast_to(
        jnp.arange(depth + 1, dtype=jnp.float32), (*start_K.shape[:-1], depth + 1)
    )
    cut_MK = _expected_precision(
        position_K[..., None, :],
        start_K[..., None, :],
        slots[..., None],
        before_K[..., None, :],
        found_M[..., None],
    )
    cut_M = jnp.where((real_K & in_last_K)[..., None, :], cut_MK, 0.0).sum(-1)
    divisor_M = before + found_M
    value_M = (whole[..., None] + cut_M) / jnp.maximum(divisor_M, 1.0)
    weight_M = _hypergeometric(found_M, slots, inside, size)
    return jnp.where(weight_M > 0, weight_M * value_M, 0.0).sum(-1)


def _prepared(scores: Array, labels: Array, where: Array | None) -> tuple[Array, Array, Array]:
    where = jnp.ones(scores.shape, bool) if where is None else jnp.asarray(where)
    scores = jnp.asarray(scores, jnp.float32)
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    return scores, jnp.where(where, labels, 0).astype(jnp.float32), where


def _above(score_N: Array, where_N: Array) -> Array:
    """[..., i, j]: candidate j stands strictly above candidate i."""
    return (score_N[..., None, :] > score_N[..., :, None]) & where_N[..., None, :]


def _equal(score_N: Array, where_N: Array) -> Array:
    return (score_N[..., None, :] == score_N[..., :, None]) & where_N[..., None, :]


def _rank_and_ties(score_N: Array, where_N: Array) -> tuple[Array, Array]:
    """How many stand strictly above each candidate, and how many share its score (itself too)."""
    return _above(score_N, where_N).sum(-1), _equal(score_N, where_N).sum(-1)


def _expected_precision(position, start, size, before, positives):
    """E[positive at p and precision at p], in a group of `size` equal scores after `start` others.

    `before` positives stand above the group and `positives` in it, in random order.
    """
    others = (position - start - 1.0) * (positives - 1.0) / jnp.maximum(size - 1.0, 1.0)
    at_position = positives / jnp.maximum(size, 1.0)
    return at_position * (before + 1.0 + others) / position


def _hypergeometric(found, drawn, positives, size):
    """P(found positives among drawn of size, positives of which are positive)."""
    possible = (found <= positives) & (found <= drawn) & (drawn - found <= size - positives)

    def log_choose(n, m):
        m = jnp.clip(m, 0.0, n)
        return gammaln(n + 1.0) - gammaln(m + 1.0) - gammaln(n - m + 1.0)

    log_p = log_choose(positives, found) + log_choose(size - positives, drawn - found)
    return jnp.where(possible, jnp.exp(log_p - log_choose(size, drawn)), 0.0)
