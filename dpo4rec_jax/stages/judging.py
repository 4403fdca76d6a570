"""The reward of texts: how well the re-ranker ranks a user's lists when shown each text.

R(user, text) is the mean over the user's lists of NDCG@k with that text's vector in place of the
user's. A cross-fitted judge scores a user only by the fold member that never saw that user.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float64, Int, Int32

from dpo4rec_jax.models.lists import Lists, map_lists
from dpo4rec_jax.models.reranker import RerankerConfig
from dpo4rec_jax.objectives import log_likelihood, ndcg
from dpo4rec_jax.weights.reranker import Members


@dataclass(frozen=True)
class Rewards:
    """Means over each user's lists, for each of his texts; 0 where `mask_UC` says there is none.

    `user_U` are user indices. `logp_UC`: mean log-probability, nats, of a positive in its list.
    """

    user_U: Int32[np.ndarray, " U"]
    ndcg_UC: Float64[np.ndarray, "U C"]
    logp_UC: Float64[np.ndarray, "U C"]
    mask_UC: Bool[np.ndarray, "U C"]

    def by_owner(self, owner_U: Int32[np.ndarray, " V"]) -> Rewards:
        """The same of the users whose texts they are, where user u was shown by `owner_U[u]`'s."""
        user_U = owner_U[self.user_U]
        order_U = np.argsort(user_U)
        rest = (self.ndcg_UC, self.logp_UC, self.mask_UC)
        return Rewards(user_U[order_U], *(value_UC[order_U] for value_UC in rest))


def judge(
    members: Members,
    lists: Lists,
    index_L: Int[np.ndarray, " L"],
    fold_U: Int32[np.ndarray, " U"],
    k: int,
    advance: Callable[[int], None] = lambda lists: None,
) -> Rewards:
    """Rewards of all texts of the users whose lists stand at `index_L`.

    A user of fold f is judged by fold member f; one of no fold (-1), and everyone where the members
    have no folds, by the mean over all judges.
    """
    assert lists.user_UCF is not None and lists.count_U is not None
    samples = lists.user_UCF.shape[1]
    user_L = np.asarray(lists.user_L)[index_L]
    fold_L = fold_U[user_L] if members.folds else np.full(len(index_L), -1)
    num_judges = members.folds or members.seeds
    sum_LC = np.zeros((2, len(index_L), samples))
    # Lists padded to one size, so that all judges run one compiled program.
    own = [np.flatnonzero((fold_L == f) | (fold_L == -1)) for f in range(num_judges)]
    size = max(len(at) for at in own)
    for number, at in enumerate(own):
        params = jax.tree.map(lambda leaf, n=number: leaf[n], members.fold_params)
        padded_T = np.zeros(size, np.int32)
        padded_T[: len(at)] = index_L[at]
        values = _text_metrics(members.config, samples, k, params, lists, jnp.asarray(padded_T))
        sum_LC[:, at] += np.stack([np.asarray(value_TC)[: len(at)] for value_TC in values])
        advance(len(at))
    sum_LC /= np.where(fold_L == -1, num_judges, 1)[None, :, None]
    return _by_user(sum_LC, user_L, np.asarray(lists.count_U))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _text_metrics(
    config: RerankerConfig, samples: int, k: int, params: Any, lists: Lists, index_T: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """NDCG@k and log-likelihood of each list by each text of its user."""

    def reduce(score_BCN, label_BCN, mask_BCN):
        return (
            ndcg(score_BCN, label_BCN, where=mask_BCN, k=k),
            log_likelihood(score_BCN, label_BCN, where=mask_BCN),
        )

    return map_lists(config, params, lists, index_T, reduce, samples)


def _by_user(value_XLC: np.ndarray, user_L: np.ndarray, count_U: np.ndarray) -> Rewards:
    user_U, place_L = np.unique(user_L, return_inverse=True)
    samples = value_XLC.shape[-1]
    mask_UC = np.arange(samples)[None] < count_U[user_U][:, None]
    num_lists_U = np.bincount(place_L)
    # Float64, and every text of a user summed in the same order: equal NDCGs stay equal.
    means = []
    for value_LC in value_XLC:
        sum_UC = np.zeros((len(user_U), samples))
        np.add.at(sum_UC, place_L, value_LC)
        means.append(np.where(mask_UC, sum_UC / num_lists_U[:, None], 0.0))
    ndcg_UC, logp_UC = means
    return Rewards(user_U.astype(np.int32), ndcg_UC, logp_UC, mask_UC)
