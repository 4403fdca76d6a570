"""EASE: the regression against its definition, with every training user really left out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import ranking_world as world

from dpo4rec_jax.config import InputError, RankConfig
from dpo4rec_jax.data.prepared import TRAIN
from dpo4rec_jax.models import ease
from dpo4rec_jax.stages import affinities, arms
from dpo4rec_jax.stages.fitting import fit_arm

USERS, ITEMS, RIDGE = 30, 12, 5.0


def likes(seed=0):
    """Likes of those who train, and what everyone likes in the window."""
    random = np.random.default_rng(seed)
    liked_UI = random.random((USERS, ITEMS)) < 0.4
    window_UI = liked_UI & (random.random((USERS, ITEMS)) < 0.5)
    window_UI[1] = False
    liked_UI[random.random(USERS) < 0.3] = False
    return liked_UI, window_UI


def by_definition(liked_UI, window_UI):
    """One inverse a user, of the likes of all others."""
    fit_UI = np.zeros((USERS, ITEMS))
    for user in range(USERS):
        x = liked_UI[np.arange(USERS) != user].astype(np.float64)
        inverse = np.linalg.inv(x.T @ x + RIDGE * np.eye(ITEMS))
        weight = -inverse / np.diag(inverse)[None]
        np.fill_diagonal(weight, 0.0)
        fit_UI[user] = window_UI[user] @ weight / max(window_UI[user].sum(), 1)
    return fit_UI / fit_UI.std()


def test_every_user_is_scored_by_the_others(monkeypatch):
    monkeypatch.setattr(ease, "BLOCK", 8)  # the last block is not full
    found_UI = ease.affinities(*likes(), RIDGE)
    np.testing.assert_allclose(found_UI, by_definition(*likes()), atol=2e-5)
    assert not found_UI[1].any()  # nothing liked in the window


def test_what_a_user_likes_later_says_nothing_about_himself():
    liked_UI, window_UI = likes()
    user = int(np.flatnonzero(liked_UI.any(1) & window_UI.any(1))[0])
    before_I = ease.affinities(liked_UI, window_UI, RIDGE)[user]
    liked_UI[user] = window_UI[user]
    after_I = ease.affinities(liked_UI, window_UI, RIDGE)[user]
    scale = np.linalg.norm(after_I) / np.linalg.norm(before_I)  # the deviation of all changes
    np.testing.assert_allclose(after_I, scale * before_I, atol=2e-5)


def test_training_users_likes_are_learned_from_and_everyones_windows_are_read():
    prepared = world.make_prepared()
    liked_UI, window_UI = affinities.likes(prepared)
    label = {
        (user, item)
        for user, item_N, label_N in zip(
            prepared.user_L, prepared.item_LN, prepared.label_LN, strict=True
        )
        for item in item_N[label_N > 0]
    }
    place = {item: index for index, item in enumerate(prepared.item_id)}
    for user, told in enumerate(prepared.users):
        liked = {place[item] for item in told["likes"]}
        own = slice(prepared.offset_U1[user], prepared.offset_U1[user] + prepared.window_U[user])
        assert liked <= set(prepared.item_E[own].tolist())
        assert set(np.flatnonzero(window_UI[user])) == liked
        later = {item for whose, item in label if whose == user}
        known = liked | later if told["split"] == "train" else set()
        assert set(np.flatnonzero(liked_UI[user])) == known
    found_UI = affinities.affinities_of(prepared, RIDGE)
    np.testing.assert_array_equal(found_UI, ease.affinities(liked_UI, window_UI, RIDGE))
    assert affinities.affinities_of(prepared, RIDGE) is found_UI  # once for all arms


def test_the_labels_of_those_who_do_not_train_move_nothing():
    prepared = world.make_prepared()
    tested_L = prepared.split_U[prepared.user_L] != TRAIN
    flipped_LN = np.where(tested_L[:, None], 1 - prepared.label_LN, prepared.label_LN)
    other = dataclasses.replace(prepared, label_LN=flipped_LN)
    np.testing.assert_array_equal(
        affinities.affinities_of(other, RIDGE), affinities.affinities_of(prepared, RIDGE)
    )


def test_what_fits_no_memory_or_no_float_is_refused(monkeypatch):
    prepared = world.make_prepared()
    monkeypatch.setattr(ease, "affinities", lambda *_: np.full((1, 1), np.nan, np.float32))
    with pytest.raises(InputError, match=r"rank\.ease: a ridge of 5 is too small .* raise it"):
        affinities.affinities_of(prepared, RIDGE)
    monkeypatch.setattr(affinities, "MOST_BYTES", 2**10)
    with pytest.raises(InputError, match=r"rank\.ease: expected to take at most .* leave it null"):
        affinities.affinities_of(prepared, RIDGE)


def test_a_reranker_weighs_the_affinity_and_ranks_better_by_it():
    prepared = world.make_prepared(users=300)
    plain = RankConfig.model_validate({**world.RANK, "seeds": 1, "epochs": 6})
    with_it = plain.model_copy(update={"ease": RIDGE})
    best = {}
    for rank in (plain, with_it):
        lists = arms.lists_of(prepared, None, rank)
        members, fitted = fit_arm(prepared, lists, rank, seed=0)
        best[rank.ease] = fitted.best_R[0]
        assert members.config.ease == rank.ease
    assert members.params_R["affinity"] > 0
    assert best[RIDGE] > best[None]
