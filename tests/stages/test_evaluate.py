"""Stage evaluate: metrics of test lists by seed, and what an alignment moved."""

from __future__ import annotations

import json

import numpy as np
import pytest
import ranking_world as world

from dpo4rec_jax.config import InputError
from dpo4rec_jax.data.prepared import TEST
from dpo4rec_jax.stages import evaluate, prefer
from dpo4rec_jax.workspace import write_json

DRIFT = {"reward_accuracy": 0.7, "margin": 0.4, "kl": 1.5}


@pytest.fixture(scope="module")
def evaluated():
    workspace, prepared = world.ranked()
    prefer.run(world.make_stage(workspace, "prefer", 0))
    write_json(workspace.stage_dir("align", 0) / "summary.json", DRIFT | {"steps": 3})
    arrays = []
    for round in (0, 1):
        stage = world.make_stage(workspace, "evaluate", round)
        evaluate.run(stage)
        with np.load(stage.directory / "metrics.npz", allow_pickle=False) as file:
            arrays.append(dict(file))
    return workspace, prepared, arrays


def test_metrics_are_seeds_by_test_lists_for_every_arm(evaluated):
    _, prepared, arrays = evaluated
    test_L = np.flatnonzero(prepared.split_U[prepared.user_L] == TEST)
    for round, arms in ((0, {"backbone", "kar"}), (1, {"dpo4rec-1"})):
        np.testing.assert_array_equal(arrays[round]["user_L"], prepared.user_L[test_L])
        names = {name.split("/")[0] for name in arrays[round] if "/" in name}
        assert names == arms
        for arm in arms:
            for name in ("ndcg@1", "ndcg@3", "ndcg@5_std", "map@7", "map@7_std"):
                assert arrays[round][f"{arm}/{name}"].shape == (world.RANK["seeds"], len(test_L))


def test_lists_without_positives_are_zero_in_kars_metrics_and_left_out_of_the_standard(evaluated):
    _, prepared, arrays = evaluated
    test_L = np.flatnonzero(prepared.split_U[prepared.user_L] == TEST)
    empty_L = prepared.label_LN[test_L].sum(1) == 0
    assert empty_L.any() and not empty_L.all()
    assert not arrays[0]["kar/ndcg@5"][:, empty_L].any()
    assert np.isnan(arrays[0]["kar/map@5_std"][:, empty_L]).all()
    assert np.isfinite(arrays[0]["kar/map@5_std"][:, ~empty_L]).all()


def test_ndcg_at_1_of_a_list_is_whether_a_positive_is_first(evaluated):
    _, _, arrays = evaluated
    assert set(np.unique(arrays[0]["kar/ndcg@1"])) <= {0.0, 1.0}
    np.testing.assert_array_equal(arrays[0]["kar/map@1"], arrays[0]["kar/ndcg@1"])


def test_alignment_holds_rewards_of_fresh_texts_before_and_after_by_the_same_judge(evaluated):
    workspace, _, _ = evaluated
    found = json.loads((workspace.stage_dir("evaluate", 1) / "alignment.json").read_text())
    assert found["round"] == 1
    with np.load(workspace.stage_dir("prefer", 0) / "scores.npz", allow_pickle=False) as file:
        before = float(file["reward_UC"].mean())
    assert found["reward_mean_before"] == pytest.approx(before, abs=1e-5)
    assert found["reward_mean_after"] != found["reward_mean_before"]
    assert {name: found[name] for name in DRIFT} == DRIFT
    assert not (workspace.stage_dir("evaluate", 0) / "alignment.json").exists()


def test_rewards_of_validation_users_are_in_the_alignment_too(evaluated):
    workspace, _, _ = evaluated
    found = json.loads((workspace.stage_dir("evaluate", 1) / "alignment.json").read_text())
    for when in ("before", "after"):
        assert 0.0 < found[f"reward_mean_validation_{when}"] < 1.0


def test_re_rankers_that_are_not_there_name_the_stage_to_run(tmp_path):
    prepared = world.make_prepared()
    workspace = world.make_workspace(tmp_path, prepared)
    with pytest.raises(InputError, match="run stage rank"):
        evaluate.run(world.make_stage(workspace, "evaluate", 0))
