"""Losses of candidate lists: one value a list, in float32, 0 where a list can teach nothing.

`where` is False on padding. A list without a positive (or, for the losses that compare, without a
comparison) has loss 0 and gradient 0, as has an all-masked one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Num

Array = jax.Array | np.ndarray

# Stands in for minus infinity on padding: exp of it is 0 and its gradients are finite.
PADDED = -1e9


@partial(jax.jit, static_argnames=("kind", "temperature"))
def listwise_loss(
    scores: Float[Array, "*batch N"],
    labels: Num[Array, "*batch N"],
    *,
    where: Bool[Array, "*batch N"] | None = None,
    kind: str = "softmax",
    temperature: float = 0.1,
) -> Float[jax.Array, "*batch"]:
    """The loss called `kind`: softmax, bce, attention_rank, listmle or approx_ndcg.

    `temperature` is approx_ndcg's only, in units of the scores.
    """
    where = jnp.ones(scores.shape, bool) if where is None else jnp.asarray(where)
    labels = jnp.where(where, labels, 0).astype(jnp.float32)
    scores = jnp.where(where, jnp.asarray(scores, jnp.float32), 0.0)
    if kind == "approx_ndcg":
        return approx_ndcg(scores, labels, where, temperature)
    assert kind in LOSSES, f"unknown loss {kind!r}"
    return LOSSES[kind](scores, labels, where)


def log_likelihood(
    scores: Float[Array, "*batch N"],
    labels: Num[Array, "*batch N"],
    *,
    where: Bool[Array, "*batch N"] | None = None,
) -> Float[jax.Array, "*batch"]:
    """Mean log-probability, in nats, that a softmax over the list gives to a positive.

    What separates two texts whose NDCG is equal. 0 for a list without positives.
    """
    return -listwise_loss(scores, labels, where=where, kind="softmax")


def softmax(scores: jax.Array, labels: jax.Array, where: jax.Array) -> jax.Array:
    """Cross-entropy to the labels spread over the positives (ListNet, Cao et al. 2007)."""
    logp_N = jax.nn.log_softmax(jnp.where(where, scores, PADDED), axis=-1)
    total = labels.sum(-1, keepdims=True)
    target_N = labels / jnp.where(total > 0, total, 1.0)
    return -jnp.where(target_N > 0, target_N * logp_N, 0.0).sum(-1)


def bce(scores: jax.Array, labels: jax.Array, where: jax.Array) -> jax.Array:
    """KAR's: binary cross-entropy of each candidate's sigmoid, mean over the list.

    The one loss to which a list without positives still says that its candidates are bad.
    """
    target_N = (labels > 0).astype(jnp.float32)
    loss_N = jax.nn.softplus(scores) - target_N * scores
    return jnp.where(where, loss_N, 0.0).sum(-1) / jnp.maximum(where.sum(-1), 1)


def attention_rank(scores: jax.Array, labels: jax.Array, where: jax.Array) -> jax.Array:
    """Binary cross-entropy between the attention of scores and that of labels (Ai et al. 2018, 8).

    Attention of labels: exp(label) on positives, 0 elsewhere, normalised over the list.
    """
    phi_N = jnp.where(labels > 0, jnp.exp(labels), 0.0)
    total = phi_N.sum(-1, keepdims=True)
    target_N = phi_N / jnp.where(total > 0, total, 1.0)
    logp_N = jax.nn.log_softmax(jnp.where(where, scores, PADDED), axis=-1)
    # log(1 - p) near p = 1 is where this loss breaks; the clip bounds value and gradient.
    log_rest_N = jnp.log1p(-jnp.clip(jnp.exp(logp_N), 0.0, 1.0 - 1e-6))
    loss_N = -(target_N * logp_N + (1.0 - target_N) * log_rest_N)
    teaches = where & (total > 0)
    return jnp.where(teaches, loss_N, 0.0).sum(-1)


def listmle(scores: jax.Array, labels: jax.Array, where: jax.Array) -> jax.Array:
    """Negative Plackett-Luce log-likelihood of the order by label (Xia et al. 2008).

    Equal labels keep the order of the list, which the data shuffles.
    """
    sort_key = jnp.where(where, -labels, jnp.inf)
    order_N = jnp.argsort(sort_key, axis=-1, stable=True)
    ordered_N = jnp.take_along_axis(jnp.where(where, scores, PADDED), order_N, axis=-1)
    real_N = jnp.take_along_axis(where, order_N, axis=-1)
    # log sum exp over each candidate and those ranked below it
    remaining_N = jax.lax.cumlogsumexp(ordered_N, axis=ordered_N.ndim - 1, reverse=True)
    teaches = real_N & (labels.sum(-1, keepdims=True) > 0)
    return jnp.where(teaches, remaining_N - ordered_N, 0.0).sum(-1)


def approx_ndcg(
    scores: jax.Array, labels: jax.Array, where: jax.Array, temperature: float = 0.1
) -> jax.Array:
    """Minus the NDCG of smooth ranks: 1 + sigmoids of score differences (Qin et al. 2010)."""
    gain_N = jnp.exp2(labels) - 1.0
    difference_NN = (scores[..., None, :] - scores[..., :, None]) / temperature
    off_diagonal = ~jnp.eye(scores.shape[-1], dtype=bool)
    other_NN = where[..., None, :] & jnp.broadcast_to(off_diagonal, difference_NN.shape)
    rank_N = 1.0 + jnp.where(other_NN, jax.nn.sigmoid(difference_NN), 0.0).sum(-1)
    dcg = (gain_N / jnp.log2(1.0 + rank_N)).sum(-1)
    position_N = jnp.arange(1, scores.shape[-1] + 1, dtype=jnp.float32)
    ideal_N = -jnp.sort(-gain_N, axis=-1)
    ideal = jnp.einsum("...n,n->...", ideal_N, 1.0 / jnp.log2(1.0 + position_N))
    return -jnp.where(ideal > 0, dcg / jnp.where(ideal > 0, ideal, 1.0), 0.0)


LOSSES: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "softmax": softmax,
    "bce": bce,
    "attention_rank": attention_rank,
    "listmle": listmle,
    "approx_ndcg": approx_ndcg,
}
