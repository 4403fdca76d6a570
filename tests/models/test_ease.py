"""EASE: the regression against its definition, with every training user really left out."""

from __future__ import annotations

import numpy as np
import pytest
import ranking_world as world

from dpo4rec_jax.config import InputError, RankConfig
from dpo4rec_jax.models import ease
from dpo4rec_jax.stages import arms
from dpo4rec_jax.stages.fitting import fit_arm

USERS, ITEMS, RIDGE = 30, 12, 5.0


def likes(seed=0):
    """Likes, those of them that stand in the window, and who trains."""
    random = np.random.default_rng(seed)
    liked_UI = random.random((USERS, ITEMS)) < 0.4
    window_UI = liked_UI & (random.random((USERS, ITEMS)) < 0.5)
    window_UI[1] = False
    return liked_UI, window_UI, random.random(USERS) < 0.7


def by_definition(liked_UI, window_UI, train_U):
    """One inverse a user, of the likes of all other training users."""
    fit_UI = np.zeros((USERS, ITEMS))
    for user in range(USERS):
        others = train_U & (np.arange(USERS) != user)
        x = liked_UI[others].astype(np.float64)
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
    liked_UI, window_UI, train_U = likes()
    user = int(np.flatnonzero(train_U & window_UI.any(1))[0])
    before_I = ease.affinities(liked_UI, window_UI, train_U, RIDGE)[user]
    liked_UI[user] = window_UI[user]
    after_I = ease.affinities(liked_UI, window_UI, train_U, RIDGE)[user]
    scale = np.linalg.norm(after_I) / np.linalg.norm(before_I)  # the deviation of all changes
    np.testing.assert_allclose(after_I, scale * before_I, atol=2e-5)


def test_affinities_are_of_likes_before_the_lists():
    prepared = world.make_prepared()
    found_UI = arms.affinities(prepared, RIDGE)
    place = {item: index for index, item in enumerate(prepared.item_id)}
    window_UI = np.zeros(found_UI.shape, bool)
    for user, told in enumerate(prepared.users):
        window_UI[user, [place[item] for item in told["likes"]]] = True
    np.testing.assert_array_equal(found_UI.any(1), window_UI.any(1))
    for user in range(len(window_UI)):
        own = slice(prepared.offset_U1[user], prepared.offset_U1[user] + prepared.window_U[user])
        assert set(np.flatnonzero(window_UI[user])) <= set(prepared.item_E[own].tolist())


def test_a_table_that_no_memory_holds_is_refused(monkeypatch):
    monkeypatch.setattr(arms, "AFFINITY_BYTES", 2**10)
    with pytest.raises(InputError, match=r"rank\.ease: expected at most .* leave it null"):
        arms.affinities(world.make_prepared(), RIDGE)


def test_a_reranker_weighs_the_affinity_and_ranks_better_by_it():
    prepared = world.make_prepared(users=300)
    plain = RankConfig.model_validate({**world.RANK, "seeds": 1, "epochs": 6})
    with_it = plain.model_copy(update={"ease": RIDGE})
    best = {}
    for rank in (plain, with_it):
        lists = arms.lists_of(prepared, None, rank)
        members, fitted = fit_arm(prepared, lists, rank, seed=0)
        best[rank.ease] = fitted.best_R[0]
        assert members.config.affinity is (rank.ease is not None)
    assert members.params_R["affinity"] > 0
    assert best[RIDGE] > best[None]
