"""predict: scores of a loaded re-ranker, new users and items by their texts, bad lines."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ranking_world as world

from dpo4rec_jax import predict
from dpo4rec_jax.config import InputError
from dpo4rec_jax.models.lists import score_batch
from dpo4rec_jax.serving import load_reranker
from dpo4rec_jax.stages import rank
from dpo4rec_jax.stages.arms import arms_of, knowledge_of, lists_of
from dpo4rec_jax.weights.reranker import load_members


@pytest.fixture(scope="module")
def finished():
    workspace = world.finished()
    _, prepared = world.ranked()
    return world.make_stage(workspace, "evaluate", 1), prepared


def raw_lists(prepared, rows):
    return [
        {
            "user": prepared.user_id[prepared.user_L[row]],
            "items": [prepared.item_id[item] for item in prepared.item_LN[row]],
        }
        for row in rows
    ]


def expected_scores(stage, prepared, arm, rows, member):
    round = 1 if arm == "dpo4rec-1" else 0
    found = next(a for a in arms_of(stage.config, stage.workspace, round) if a.name == arm)
    members = load_members(found.file(stage.workspace, round))
    params = jax.tree.map(lambda leaf: leaf[member], members.params_R)
    lists = lists_of(prepared, knowledge_of(found, prepared), stage.config.rank)
    return score_batch(members.config, params, lists, jnp.asarray(rows))


@pytest.mark.parametrize("arm", ["dpo4rec-1", "backbone"])
def test_scores_are_those_of_the_best_seed(finished, arm):
    stage, prepared = finished
    rows = [3, 0, 77]
    directory = stage.workspace.stage_dir("rank", 1 if arm == "dpo4rec-1" else 0)
    summary = json.loads((directory / f"{arm}.json").read_text())
    best = int(np.argmax(summary["validation_ndcg@5"]))
    scores = load_reranker(stage.workspace.path, arm=arm).score(raw_lists(prepared, rows))
    expected = expected_scores(stage, prepared, arm, rows, best)
    np.testing.assert_allclose(np.stack(scores), expected, atol=1e-5)


def test_ensemble_is_the_mean_over_seeds_and_the_last_round_is_the_default(finished):
    stage, prepared = finished
    loaded = load_reranker(stage.workspace.path, ensemble=True)
    scores = loaded.score(raw_lists(prepared, [5]))
    seeds = [expected_scores(stage, prepared, "dpo4rec-1", [5], seed)[0] for seed in (0, 1)]
    np.testing.assert_allclose(scores[0], np.mean(seeds, axis=0), atol=1e-5)


def test_affinities_are_those_that_it_was_trained_with(tmp_path):
    """Whatever the config says since; a new user and a new item fit nothing."""
    prepared = world.make_prepared()
    workspace = world.make_workspace(tmp_path, prepared, rounds=0)
    sections = {"rounds": 0, "rank": {**world.RANK, "seeds": 1, "ease": 20.0}}
    stage = world.make_stage(workspace, "rank", 0, **sections)
    rank.run(stage)
    world.write_config(workspace, prepared, rounds=0)
    rows = [3, 0, 77]
    loaded = load_reranker(workspace.path)
    scores = loaded.score(raw_lists(prepared, rows))
    expected = expected_scores(stage, prepared, "kar", rows, 0)
    np.testing.assert_allclose(np.stack(scores), expected, atol=1e-5)
    loaded.describe(users={"new user": "likes drama"}, items={"new item": "a drama of the 1960s"})
    np.testing.assert_allclose(loaded.score(raw_lists(prepared, [77]))[0], scores[2], atol=1e-5)
    assert np.isfinite(loaded.score([{"user": "new user", "items": ["new item", "i1"]}])[0]).all()


def test_lists_of_any_length_and_any_number(finished):
    stage, prepared = finished
    loaded = load_reranker(stage.workspace.path)
    one = raw_lists(prepared, [4])[0]
    short = {"user": one["user"], "items": one["items"][:3]}
    many = loaded.score([one, short] * 40)
    assert [len(scores) for scores in many] == [10, 3] * 40
    np.testing.assert_allclose(many[-1], loaded.score([short])[0], atol=1e-5)
    assert loaded.score([]) == []


def test_new_users_and_items_are_scored_by_their_texts(finished):
    stage, prepared = finished
    loaded = load_reranker(stage.workspace.path)
    known = raw_lists(prepared, [2])[0]
    before = loaded.score([known])[0]
    lists = [{"user": "new user", "items": ["new item", *known["items"][1:]]}]
    with pytest.raises(InputError, match="list 1: unknown user 'new user'"):
        loaded.score(lists)
    loaded.describe(users={"new user": "likes drama"}, items={"new item": "a drama of the 1960s"})
    likes_drama = loaded.score(lists)[0]
    assert np.isfinite(likes_drama).all()
    np.testing.assert_allclose(loaded.score([known])[0], before, atol=1e-5)
    loaded.describe(users={"new user": "hates everything, above all westerns"})
    assert np.abs(loaded.score(lists)[0] - likes_drama).max() > 1e-5


def test_the_command_hands_on_what_loads():
    assert predict.load_reranker is load_reranker


def test_command_reads_and_writes_lines(finished, tmp_path, capsys):
    stage, prepared = finished
    lists = raw_lists(prepared, range(5))
    lists[0]["items"] = lists[0]["items"][:4]
    source, output = tmp_path / "lists.jsonl", tmp_path / "scores.jsonl"
    text = "".join(json.dumps(one) + "\n" for one in lists)
    source.write_text(text, encoding="utf-8-sig")  # as some editors write it
    arguments = ["--workdir", str(stage.workspace.path), "--input", str(source)]
    assert predict.main([*arguments, "--output", str(output)]) == 0
    lines = [json.loads(line) for line in output.open()]
    assert [line["items"] for line in lines] == [one["items"] for one in lists]
    scores = load_reranker(stage.workspace.path).score(lists)
    for line, expected in zip(lines, scores, strict=True):
        np.testing.assert_allclose(line["scores"], expected, atol=1e-5)
        assert line["order"] == np.argsort(-expected, kind="stable").tolist()


def test_prm_says_that_a_list_is_longer_than_its_positions(finished):
    stage, prepared = finished
    one = raw_lists(prepared, [0])[0]
    with pytest.raises(InputError, match="prm learned positions up to 10"):
        load_reranker(stage.workspace.path).score([{**one, "items": one["items"] * 2}])


def test_a_workspace_without_the_arm_names_those_it_has(finished, tmp_path):
    stage, _ = finished
    with pytest.raises(InputError, match=r"config\.yaml"):
        load_reranker(tmp_path)
    with pytest.raises(InputError, match="dpo4rec-1, backbone, kar"):
        load_reranker(stage.workspace.path, arm="dpo4rec-9")
