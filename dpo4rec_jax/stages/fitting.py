"""Fitting the re-rankers of one arm: every seed, and every cross-fitting fold, in one program."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Bool, Int32

from dpo4rec_jax.config import InputError, RankConfig
from dpo4rec_jax.data.prepared import TRAIN, VALIDATION, Prepared
from dpo4rec_jax.models import reranker
from dpo4rec_jax.models.cooccurrence import spectrum
from dpo4rec_jax.models.cuts import Met, cut_anew, interactions, met_of
from dpo4rec_jax.models.lists import Lists, count_distinct, map_lists, score_batch
from dpo4rec_jax.models.negatives import Unmet, redrawn, unmet_of
from dpo4rec_jax.models.reranker import RerankerConfig, attribute_tables
from dpo4rec_jax.objectives import listwise_loss, ndcg
from dpo4rec_jax.runtime.epoch import Problem, Schedule
from dpo4rec_jax.runtime.fit import Fitted, fit
from dpo4rec_jax.stages.arms import lists_in, reranker_config
from dpo4rec_jax.weights.reranker import Members

SELECTION_K = 5  # epochs are selected on validation users by ndcg@5 in KAR's convention


@struct.dataclass
class FitData:
    """What the fitting program reads on the device."""

    lists: Lists
    validation_V: jax.Array  # indices of the lists to select on
    unmet: Unmet | None = None  # what negatives are drawn from anew, None: they stay
    met: Met | None = None  # what lists are cut from anew, None: they stay


def fit_arm(
    prepared: Prepared,
    lists: Lists,
    rank: RankConfig,
    seed: int,
    fold_U: Int32[np.ndarray, " U"] | None = None,
    on_epoch: Callable[[int, np.ndarray, np.ndarray], None] | None = None,
    max_skipped: int = 5,
    mesh: Mesh | None = None,
) -> tuple[Members, Fitted]:
    """Trains `rank.seeds` members on all training users and, given folds, one more a fold that
    never draws a list of that fold's users. All are selected on the validation users.

    Raises Diverged where losses are not finite in `max_skipped` steps in a row, and InputError
    where no loss is finite.
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
    params_R = first_params(config, seed, rank.seeds + folds)
    user_E = np.repeat(np.arange(len(prepared.user_id)), np.diff(prepared.offset_U1))
    sequences = user_E, prepared.item_E, len(prepared.item_id), lists
    event_LN = interactions(*sequences)
    met = met_of(event_LN, lists, train_L, seed)
    if rank.item_init == "cooccurrence":
        params_R = with_spectra(params_R, met, draws_RL, prepared.user_L)
    data = FitData(
        lists,
        jnp.asarray(lists_in(prepared, VALIDATION)),
        unmet_of(*sequences, event_LN, train_L, seed) if rank.negatives == "redrawn" else None,
        met if rank.cuts == "redrawn" else None,
    )
    fitted = fit(
        problem_of(config, rank.loss, rank.user_text),
        params_R,
        data,
        draws_RL,
        jax.random.fold_in(key, 1),
        schedule_of(rank),
        on_epoch,
        max_skipped,
        mesh,
    )
    if not np.isfinite(fitted.loss_ER).any(0).all() or not np.isfinite(fitted.best_R).all():
        raise InputError(
            f"rank: training of {rank.backbone} is not finite; lower rank.learning_rate "
            f"(now {rank.learning_rate})"
        )
    return Members(config, jax.device_get(fitted.params_R), rank.seeds, folds), fitted


def first_params(config: RerankerConfig, seed: int, members: int) -> Any:
    """Parameters of so many members, each of a seed of its own, stacked."""
    # The backend's own generator compiles in half the time of the portable one.
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), members)
    init = jax.jit(functools.partial(reranker.init, config))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(init(key) for key in keys))


def with_spectra(
    params_R: Any,
    met: Met,
    draws_RL: Bool[np.ndarray, "R L"],
    user_L: Int32[np.ndarray, " L"],
) -> Any:
    """The members with item embeddings that begin where `spectrum` puts the items, by what was met
    by the users whose lists each member may see. Dimensions beyond it stay as they are."""
    table_RID = np.array(params_R["item_embed"]["embedding"])
    user_P, item_P = np.asarray(met.user_P), np.asarray(met.item_P)
    spectra: dict[bytes, np.ndarray] = {}
    for table_ID, draws_L in zip(table_RID, draws_RL, strict=True):
        key = draws_L.tobytes()
        if key not in spectra:
            seen_P = np.isin(user_P, user_L[draws_L])
            items, size = table_ID.shape
            point_ID = spectrum(user_P[seen_P], item_P[seen_P], items, size, met.most)
            spectra[key] = reranker.DEVIATION * point_ID
        table_ID[:, : spectra[key].shape[1]] = spectra[key]
    return {**params_R, "item_embed": {"embedding": jnp.asarray(table_RID)}}


def schedule_of(rank: RankConfig) -> Schedule:
    return Schedule(
        epochs=rank.epochs,
        batch=rank.batch_lists,
        learning_rate=rank.learning_rate,
        weight_decay=rank.weight_decay,
        patience=rank.patience,
    )


@functools.cache  # the same problem is the same compiled program, in every round
def problem_of(config: RerankerConfig, loss_kind: str, user_text: str) -> Problem:
    """The loss of a batch of lists and the validation ndcg@5, as functions of one member."""

    def refresh(data: FitData, epoch: np.int32) -> FitData:
        lists = data.lists
        if data.met is not None:
            lists = cut_anew(lists, data.met, epoch)
        if data.unmet is not None:
            lists = redrawn(lists, data.unmet, config.num_items, epoch)
        return replace(data, lists=lists)

    def draw(data: FitData, key: jax.Array):
        """The text by which each user is shown in this epoch, and the items' attributes."""
        attributes = attribute_tables(config, data.lists.attribute_IAM)
        if data.lists.count_U is None or user_text == "first":
            return None, attributes  # a user with a best text has that one alone
        return drawn_texts(data.lists.count_U, key), attributes

    def loss(params, data: FitData, drawn, index_B, key, capacity):
        lists, (text_U, attributes) = data.lists, drawn
        sample_B = None if text_U is None else text_U[lists.user_L[index_B]]
        score_BN = score_batch(
            config,
            params,
            lists,
            index_B,
            sample_B,
            capacity=capacity or None,
            key=key if config.dropout or config.user_dropout else None,
            attributes=attributes,
        )
        label_BN, mask_BN = lists.label_LN[index_B], lists.mask_LN[index_B]
        return listwise_loss(score_BN, label_BN, where=mask_BN, kind=loss_kind)

    def validate(params, data: FitData):
        def mean_ndcg(score_BCN, label_BCN, mask_BCN):
            return ndcg(score_BCN, label_BCN, where=mask_BCN, k=SELECTION_K)

        return map_lists(config, params, data.lists, data.validation_V, mean_ndcg).mean()

    def demand(data: FitData, index_B):
        return count_distinct(data.lists, index_B)

    distinct = config.adapts and config.item_features
    return Problem(loss, validate, refresh, draw, demand if distinct else None)


def drawn_texts(count_U: jax.Array, key: jax.Array) -> jax.Array:
    """One of each user's texts at random; 0 for a user without."""
    share_U = jax.random.uniform(key, count_U.shape)
    return jnp.minimum((share_U * count_U).astype(jnp.int32), jnp.maximum(count_U - 1, 0))
