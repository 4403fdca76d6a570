"""What a user liked before, told of every item: a linear regression among items (EASE).

Steck 2019, arXiv 1905.03375: with X the likes of all training users and P the inverse of
X'X + ridge, the weight of item i for item j is -P_ij / P_jj. A training user is scored as if he had
never been met: taking one row out of X is a rank-one change of P, in closed form (Sherman and
Morrison), so nobody is recognised by his own likes.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32

BLOCK = 1024  # users at once


def affinities(
    liked_UI: Bool[np.ndarray, "U I"], window_UI: Bool[np.ndarray, "U I"], ridge: float
) -> Float32[np.ndarray, "U I"]:
    """How well every item fits the mean of what each user likes in his window, of deviation 1 over
    users and items; 0 for a user who likes nothing there.

    `liked_UI` are the likes to learn from: rows of users who do not train are False. Not finite
    where the ridge is too small for float32. Memory: a float a user and item, four for two items.
    """
    users, items = liked_UI.shape
    fit_UI = np.empty((users, items), np.float32)
    blocks = [slice(at, at + BLOCK) for at in range(0, users, BLOCK)]
    gram_II = jnp.diag(jnp.full(items, ridge, jnp.float32))
    for block in blocks:
        gram_II = _add(gram_II, jnp.asarray(liked_UI[block], jnp.float32))
    inverse_II = _inverse(gram_II)
    for block in blocks:
        liked_BI = jnp.asarray(liked_UI[block], jnp.float32)
        fit_UI[block] = _fit(inverse_II, liked_BI, jnp.asarray(window_UI[block], jnp.float32))
    if deviation := float(fit_UI.std()):
        fit_UI /= deviation
    return fit_UI


@functools.partial(jax.jit, donate_argnums=0)
def _add(gram_II: jax.Array, liked_BI: jax.Array) -> jax.Array:
    return gram_II + liked_BI.T @ liked_BI  # zeros and ones: exact in any precision


@functools.partial(jax.jit, donate_argnums=0)
def _inverse(gram_II: Float[jax.Array, "I I"]) -> Float[jax.Array, "I I"]:
    with jax.default_matmul_precision("highest"):
        factor = jax.scipy.linalg.cho_factor(gram_II, lower=True)
        return jax.scipy.linalg.cho_solve(factor, jnp.eye(len(gram_II), dtype=gram_II.dtype))


@jax.jit
def _fit(
    inverse_II: Float[jax.Array, "I I"],
    liked_BI: Float[jax.Array, "B I"],
    window_BI: Float[jax.Array, "B I"],
) -> Float[jax.Array, "B I"]:
    """Scores by the regression without the user's own row of X."""
    with jax.default_matmul_precision("highest"):
        own_BI = liked_BI @ inverse_II
        sum_BI = window_BI @ inverse_II
    removed_B1 = 1.0 / (1.0 - (liked_BI * own_BI).sum(-1, keepdims=True))
    diagonal_BI = jnp.diagonal(inverse_II)[None] + removed_B1 * own_BI**2
    sum_BI += removed_B1 * (window_BI * own_BI).sum(-1, keepdims=True) * own_BI
    sum_BI -= window_BI * diagonal_BI  # no item speaks for itself
    return -sum_BI / diagonal_BI / jnp.maximum(window_BI.sum(-1, keepdims=True), 1.0)
