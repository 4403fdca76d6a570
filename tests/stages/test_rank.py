"""Stage rank: members, folds that never see their users, arms, ablations, resuming."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ranking_world as world

from dpo4rec_jax.config import InputError, RankConfig
from dpo4rec_jax.data.knowledge import Knowledge
from dpo4rec_jax.data.prepared import TRAIN
from dpo4rec_jax.models.cuts import interactions, met_of
from dpo4rec_jax.stages import fitting, rank
from dpo4rec_jax.stages.arms import (
    arms_of,
    folds_of,
    knowledge_of,
    lists_of,
    reranker_config,
    shuffled_users,
)
from dpo4rec_jax.stages.fitting import (
    FitData,
    first_params,
    fit_arm,
    problem_of,
    with_spectra,
)
from dpo4rec_jax.weights.reranker import load_members, save_members
from dpo4rec_jax.workspace import Workspace, write_npz

SETTINGS = RankConfig.model_validate(world.RANK)


def leaves(members, at):
    return [np.asarray(leaf)[at] for leaf in jax.tree.leaves(members.params_R)]


def test_every_arm_leaves_its_members_seeds_first_then_folds():
    workspace, _ = world.ranked()
    seeds, folds = world.RANK["seeds"], world.PREFER["folds"]
    expected = {(0, "backbone"): 0, (0, "kar"): folds, (1, "dpo4rec-1"): 0}  # round 1 judges no one
    for (round, arm), num_folds in expected.items():
        members = load_members(workspace.stage_dir("rank", round) / f"{arm}.safetensors")
        assert (members.seeds, members.folds) == (seeds, num_folds)
        assert all(leaf.shape[0] == seeds + num_folds for leaf in leaves(members, slice(None)))
        summary = json.loads((workspace.stage_dir("rank", round) / f"{arm}.json").read_text())
        assert len(summary["validation_ndcg@5"]) == seeds
        curves = np.array(summary["validation_by_epoch"])
        np.testing.assert_allclose(curves.max(0)[:seeds], summary["validation_ndcg@5"])
        assert np.argmax(curves[:, 0]) == summary["best_epoch"][0]
    loss = np.array(summary["loss_by_epoch"])
    assert (loss[-1] < loss[0]).all()


def test_equal_members_are_equal_bytes(tmp_path):
    workspace, _ = world.ranked()
    path = workspace.stage_dir("rank", 0) / "kar.safetensors"
    for _ in range(4):
        save_members(tmp_path / "again.safetensors", load_members(path))
        assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_members_of_other_seeds_differ():
    workspace, _ = world.ranked()
    members = load_members(workspace.stage_dir("rank", 0) / "kar.safetensors")
    pairs = zip(leaves(members, 0), leaves(members, 1), strict=True)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in pairs)


def test_a_fold_member_never_sees_the_lists_of_its_users():
    prepared = world.make_prepared()
    lists = lists_of(prepared, world.make_knowledge(prepared), SETTINGS)
    fold_U = folds_of(prepared, 2, seed=0)
    held_L = fold_U[prepared.user_L] == 1
    flipped = np.where(held_L[:, None], 1 - prepared.label_LN, prepared.label_LN)
    plain, _ = fit_arm(prepared, lists, SETTINGS, 0, fold_U)
    changed = replace(lists, label_LN=jnp.asarray(flipped))
    other, _ = fit_arm(prepared, changed, SETTINGS, 0, fold_U)
    member = SETTINGS.seeds + 1
    for a, b in zip(leaves(plain, member), leaves(other, member), strict=True):
        np.testing.assert_array_equal(a, b)
    for seen in (0, SETTINGS.seeds):
        pairs = zip(leaves(plain, seen), leaves(other, seen), strict=True)
        assert any(np.abs(a - b).max() > 0 for a, b in pairs)


def test_a_fold_members_items_begin_by_what_other_users_met():
    prepared = world.make_prepared()
    lists = lists_of(prepared, None, SETTINGS)
    fold_U = folds_of(prepared, 2, seed=0)
    train_L = prepared.split_U[prepared.user_L] == TRAIN
    draws_RL = np.stack([train_L, train_L & (fold_U[prepared.user_L] != 1)])
    user_E = np.repeat(np.arange(len(prepared.user_id)), np.diff(prepared.offset_U1))
    event_LN = interactions(user_E, prepared.item_E, len(prepared.item_id), lists)
    met = met_of(event_LN, lists, train_L, seed=0)
    held_P = fold_U[np.asarray(met.user_P)] == 1
    moved = met.replace(item_P=jnp.where(held_P, jnp.roll(met.item_P, 5), met.item_P))
    first = first_params(reranker_config(SETTINGS, prepared, lists), 0, 2)
    one, other = (
        with_spectra(first, some, draws_RL, prepared.user_L)["item_embed"]["embedding"]
        for some in (met, moved)
    )
    assert np.abs(one[0] - other[0]).max() > 0.01
    np.testing.assert_array_equal(one[1], other[1])
    assert np.abs(one[0] - one[1]).max() > 0.01
    np.testing.assert_array_less(0.0, np.abs(one - first["item_embed"]["embedding"]).max((1, 2)))


@pytest.mark.parametrize("redrawn", [True, False])
def test_lists_are_drawn_anew_where_that_is_asked_for(redrawn, monkeypatch):
    prepared = world.make_prepared()
    lists = lists_of(prepared, None, SETTINGS)
    how = "redrawn" if redrawn else "prepared"
    seen = []

    def fit(problem, params_R, data, *rest):
        seen.extend(problem.refresh(data, np.int32(epoch)).lists.item_LN for epoch in (1, 2))
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "fit", fit)
    for key in ("cuts", "negatives"):
        changes = {"cuts": "prepared", "negatives": "prepared", key: how}
        with pytest.raises(KeyboardInterrupt):
            fit_arm(prepared, lists, SETTINGS.model_copy(update=changes), 0)
    train_L = prepared.split_U[prepared.user_L] == TRAIN
    for item_LN in seen:
        assert (np.asarray(item_LN) != prepared.item_LN)[train_L].any() == redrawn
        np.testing.assert_array_equal(np.asarray(item_LN)[~train_L], prepared.item_LN[~train_L])
    assert (seen[0] != seen[1]).any() == redrawn


@pytest.mark.parametrize(("how", "drawn"), [("any", True), ("best", True), ("first", False)])
def test_texts_are_drawn_but_where_the_first_is_asked_for(how, drawn):
    """By the best text: in round 0 nothing is scored yet, and all of them serve."""
    prepared = world.make_prepared()
    lists = lists_of(prepared, world.make_knowledge(prepared), SETTINGS)
    data = FitData(lists, jnp.zeros(1, jnp.int32))
    problem = problem_of(reranker_config(SETTINGS, prepared, lists), "softmax", how)
    text_U, _ = problem.draw(data, jax.random.key(0))
    assert (text_U is not None) is drawn
    if text_U is not None:
        assert set(text_U[prepared.split_U == TRAIN].tolist()) == set(range(world.SAMPLES))


def test_folds_are_a_balanced_partition_of_the_training_users():
    prepared = world.make_prepared()
    fold_U = folds_of(prepared, 3, seed=4)
    assert ((fold_U >= 0) == (prepared.split_U == TRAIN)).all()
    assert np.ptp(np.bincount(fold_U[fold_U >= 0])) <= 1
    np.testing.assert_array_equal(fold_U, folds_of(prepared, 3, seed=4))


def test_shuffled_users_keep_their_split_and_never_themselves():
    prepared = world.make_prepared()
    other_U = shuffled_users(prepared.split_U, seed=0)
    assert sorted(other_U) == list(range(len(other_U)))
    assert (other_U != np.arange(len(other_U))).all()
    assert (prepared.split_U[other_U] == prepared.split_U).all()


def test_of_the_arms_that_an_interrupted_run_left_the_whole_ones_are_kept(tmp_path):
    finished, prepared = world.ranked()
    stage = world.make_stage(world.make_workspace(tmp_path, prepared), "rank", 0)
    source = finished.stage_dir("rank", 0)
    for path in source.iterdir():
        shutil.copy(path, stage.directory)
    os.truncate(stage.directory / "backbone.safetensors", 2000)
    (stage.directory / "kar.json").write_text("{}")
    rank.run(stage)
    assert (stage.directory / "kar.json").read_text() == "{}"
    trained, expected = (path / "backbone.safetensors" for path in (stage.directory, source))
    assert trained.read_bytes() == expected.read_bytes()


def test_best_shows_training_users_by_the_text_that_the_last_round_preferred(tmp_path):
    prepared = world.make_prepared()
    workspace = world.make_workspace(tmp_path, prepared)
    user_U = np.flatnonzero(prepared.split_U == TRAIN)[:2].astype(np.int32)
    scores = {
        "user_U": user_U,
        "reward_UC": np.array([[0.1, 0.9, 0.2], [0.5, 0.6, 0.9]], np.float32),
        "mask_UC": np.array([[True, True, True], [True, True, False]]),
    }
    write_npz(workspace.stage_dir("prefer", 0) / "scores.npz", scores)
    before, now = (Knowledge.load(vectors(workspace, round)) for round in (0, 1))
    stage = world.make_stage(workspace, "rank", 1)
    best = rank._best_of_last_round(stage, now, prepared)
    for user, sample in zip(user_U, (1, 1), strict=True):
        np.testing.assert_array_equal(best.user_UCF[user, 0], before.user_UCF[user, sample])
        assert best.count_U[user] == 1
    rest = np.setdiff1d(np.arange(len(prepared.user_id)), user_U)
    np.testing.assert_array_equal(best.user_UCF[rest], now.user_UCF[rest])


def vectors(workspace: Workspace, round: int):
    return workspace.stage_dir("encode", round) / "vectors.npz"


@pytest.mark.parametrize("fault", ["no texts", "nan", "other users"])
def test_unusable_vectors_are_one_line_that_says_what_to_do(tmp_path, fault):
    prepared = world.make_prepared()
    workspace = world.make_workspace(tmp_path, prepared)
    stage = world.make_stage(workspace, "rank", 0)
    knowledge = world.make_knowledge(prepared)
    if fault == "no texts":
        knowledge.count_U[:] = 0
    elif fault == "nan":
        knowledge.item_IF[3] = np.nan
    else:
        knowledge.user_id[0] = "somebody else"
    knowledge.save(vectors(workspace, 0))
    arm = arms_of(stage.config, workspace, 0)[1]
    expected = {"no texts": "reason", "nan": "item_IF", "other users": "encode"}[fault]
    with pytest.raises(InputError, match=expected):
        knowledge_of(arm, prepared)


def test_more_folds_than_training_users_names_the_knob():
    prepared = world.make_prepared()
    with pytest.raises(InputError, match=r"prefer\.folds"):
        folds_of(prepared, 1000, seed=0)


def test_a_rate_that_diverges_stops_with_the_lists_and_the_knob(tmp_path):
    prepared = world.make_prepared()
    stage = world.make_stage(
        world.make_workspace(tmp_path, prepared),
        "rank",
        0,
        rank=world.RANK | {"learning_rate": 1e30, "backbone": "dlcm"},
    )
    says = (
        r"rank: \S+: loss or gradient not finite in 5 steps in a row.*rank\.learning_rate \(now 1e"
    )
    with pytest.raises(InputError, match=says):
        rank.run(stage)
    diagnosis = json.loads(next(stage.directory.glob("*-diagnosis.json")).read_text())
    assert len(diagnosis["skipped"]) == 5
    lists = diagnosis["skipped"][0]["lists"]
    assert lists and max(lists) < len(prepared.user_L)
