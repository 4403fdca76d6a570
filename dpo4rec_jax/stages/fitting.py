"""Fitting the re-rankers of one arm: every seed, and every cross-fitting fold, in one program."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Int32

from dpo4rec_jax.config import InputError, RankConfig
from dpo4rec_jax.data.prepared import TRAIN, VALIDATION, Prepared
from dpo4rec_jax.models import reranker
from dpo4rec_jax.models.lists import Lists, count_distinct, map_lists, score_batch
from dpo4rec_jax.models.reranker import RerankerConfig
from dpo4rec_jax.objectives import listwise_loss, ndcg
from dpo4rec_jax.runtime.fit import Fitted, Problem, Schedule, fit
from dpo4rec_jax.stages.arms import lists_in, reranker_config
from dpo4rec_jax.weights.reranker import Members

SELECTION_K = 5  # epochs are selected on validation users by ndcg@5 in KAR's convention


@struct.dataclass
class FitData:
    """What the fitting program reads on the device."""

    lists: Lists
    validation_V: jax.Array  # indices of the lists to select on


def fit_arm(
    prepared: Prepared,
    lists: Lists,
    rank: RankConfig,
    seed: int,
    fold_U: Int32[np.ndarray, " U"] | None = None,
    on_epoch: Callable[[int, np.ndarray, np.ndarray], None] | None = None,
) -> tuple[Members, Fitted]:
    """Trains `rank.seeds` members on all training users and, given folds, one more a fold that
    never draws a list of that fold's users. All are selected on the validation users.

    Raises InputError where the losses are not finite.
    """
    config = reranker_config(rank, prepared, lists)
    folds = 0 if fold_U is None else int(fold_U.max()) + 1
    train_L = np.zeros(len(prepared.user_L), bool)
    train_L[lists_in(prepared, TRAIN)] = True
    draws_RL = np.tile(train_L, (rank.seeds + folds, 1))
    for fold in range(folds):
        assert fold_U is not None
        draws_RL[rank.seeds + fold] &= fold_U[prepared.user_L] != fold

    key = jax.random.key(seed)
    member_keys = jax.random.split(jax.random.fold_in(key, 0), rank.seeds + folds)
    params_R = jax.jit(jax.vmap(lambda key: reranker.init(config, key)))(member_keys)
    data = FitData(lists, jnp.asarray(lists_in(prepared, VALIDATION)))
    fitted = fit(
        problem_of(config, rank),
        params_R,
        data,
        draws_RL,
        jax.random.fold_in(key, 1),
        schedule_of(rank),
        on_epoch,
    )
    if not np.isfinite(fitted.loss_ER).all() or not np.isfinite(fitted.best_R).all():
        raise InputError(
            f"rank: training of {rank.backbone} is not finite; lower rank.learning_rate "
            f"(now {rank.learning_rate})"
        )
    return Members(config, jax.device_get(fitted.params_R), rank.seeds, folds), fitted


def schedule_of(rank: RankConfig) -> Schedule:
    return Schedule(
        epochs=rank.epochs,
        batch=rank.batch_lists,
        learning_rate=rank.learning_rate,
        weight_decay=rank.weight_decay,
        patience=rank.patience,
    )


def problem_of(config: RerankerConfig, rank: RankConfig) -> Problem:
    """The loss of a batch of lists and the validation ndcg@5, as functions of one member."""

    def loss(params, data: FitData, index_B, epoch_key, step_key, capacity):
        lists = data.lists
        sample_B = None
        if lists.count_U is not None and rank.user_text == "any":
            sample_B = drawn_texts(lists, lists.user_L[index_B], epoch_key)
        key = step_key if config.dropout else None
        score_BN = score_batch(
            config, params, lists, index_B, sample_B, capacity=capacity or None, key=key
        )
        label_BN, mask_BN = lists.label_LN[index_B], lists.mask_LN[index_B]
        return listwise_loss(score_BN, label_BN, where=mask_BN, kind=rank.loss)

    def validate(params, data: FitData):
        def mean_ndcg(score_BCN, label_BCN, mask_BCN):
            return ndcg(score_BCN, label_BCN, where=mask_BCN, k=SELECTION_K)

        return map_lists(config, params, data.lists, data.validation_V, mean_ndcg).mean()

    def demand(data: FitData, index_B):
        return count_distinct(data.lists, index_B)

    return Problem(loss, validate, demand if config.item_features else None)


def drawn_texts(lists: Lists, user_B: jax.Array, epoch_key: jax.Array) -> jax.Array:
    """One of each user's texts at random, the same for all of a user's lists in an epoch."""

    def draw(user, count):
        return jax.random.randint(jax.random.fold_in(epoch_key, user), (), 0, count)

    assert lists.count_U is not None
    return jax.vmap(draw)(user_B, jnp.maximum(lists.count_U[user_B], 1))
