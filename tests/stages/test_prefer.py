"""Stage prefer: rewards by judges that never saw the user, and which texts become pairs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ranking_world as world

from dpo4rec_jax.config import InputError, PreferConfig
from dpo4rec_jax.data.prepared import TRAIN
from dpo4rec_jax.data.texts import TextRecord
from dpo4rec_jax.models.lists import score_batch
from dpo4rec_jax.objectives import log_likelihood, ndcg
from dpo4rec_jax.stages import prefer
from dpo4rec_jax.stages.arms import arms_of, knowledge_of, lists_in, lists_of, shuffled_users
from dpo4rec_jax.stages.judging import Rewards, judge
from dpo4rec_jax.stages.prefer import choose_pairs
from dpo4rec_jax.weights.reranker import load_members, save_members


@pytest.fixture(scope="module")
def preferred():
    workspace, prepared = world.ranked()
    stage = world.make_stage(workspace, "prefer", 0)
    prefer.run(stage)
    with np.load(stage.directory / "scores.npz", allow_pickle=False) as file:
        scores = dict(file)
    lines = [json.loads(line) for line in (stage.directory / "pairs.jsonl").open()]
    return stage, prepared, scores, lines


def test_reward_is_the_mean_ndcg_of_the_users_lists_by_the_fold_member_that_never_saw_him(
    preferred,
):
    stage, prepared, scores, _ = preferred
    directory = stage.workspace.stage_dir("rank", 0)
    members = load_members(directory / "kar.safetensors")
    with np.load(directory / "fold.npz", allow_pickle=False) as file:
        fold_U = file["fold_U"]
    arm = arms_of(stage.config, stage.workspace, 0)[1]
    lists = lists_of(prepared, knowledge_of(arm, prepared), stage.config.rank)
    run = jax.jit(
        lambda params, index, sample: score_batch(members.config, params, lists, index, sample)
    )
    for row in (0, 5, 17):
        user = scores["user_U"][row]
        params = jax.tree.map(
            lambda leaf, u=user: leaf[members.seeds + fold_U[u]], members.params_R
        )
        index = np.flatnonzero(prepared.user_L == user)
        # one size of batch: the last list again and again
        padded = jnp.asarray(np.pad(index, (0, 8 - len(index)), mode="edge"))
        for sample in range(world.SAMPLES):
            score_BN = run(params, padded, jnp.full((8,), sample))[: len(index)]
            args = score_BN, jnp.asarray(prepared.label_LN[index])
            where = jnp.asarray(prepared.mask_LN[index])
            expected = float(ndcg(*args, where=where, k=5).mean())
            assert scores["ndcg_UC"][row, sample] == pytest.approx(expected, abs=1e-5)
            expected = float(log_likelihood(*args, where=where).mean())
            assert scores["logp_UC"][row, sample] == pytest.approx(expected, abs=1e-4)


def test_scores_cover_all_texts_of_exactly_the_training_users(preferred):
    _, prepared, scores, _ = preferred
    with_lists = np.unique(prepared.user_L)
    train = with_lists[prepared.split_U[with_lists] == TRAIN]
    np.testing.assert_array_equal(scores["user_U"], train)
    assert scores["mask_UC"].all() and scores["mask_UC"].shape[1] == world.SAMPLES
    np.testing.assert_array_equal(scores["tokens_UC"][0], [3, 4, 5])
    np.testing.assert_array_equal(scores["reward_UC"], scores["ndcg_UC"])


def test_true_texts_earn_more_than_watered_down_ones(preferred):
    _, _, scores, _ = preferred
    true, _, empty = scores["logp_UC"].mean(0)
    assert true > empty


def test_lines_are_trl_preferences_with_the_sampled_ids(preferred):
    _, prepared, scores, lines = preferred
    assert len({line["user"] for line in lines}) == len(lines)
    for line in lines[:5]:
        user = prepared.user_id.index(line["user"])
        row = int(np.flatnonzero(scores["user_U"] == user)[0])
        reward_C, logp_C = scores["reward_UC"][row], scores["logp_UC"][row]
        order = np.lexsort((logp_C, reward_C))
        best, worst = int(order[-1]), int(order[0])
        assert line["chosen"] == [{"role": "assistant", "content": text(best, line["user"])}]
        assert line["rejected"] == [{"role": "assistant", "content": text(worst, line["user"])}]
        assert line["chosen_tokens"] == list(range(10, 13 + best))
        assert line["rejected_tokens"] == list(range(10, 13 + worst))
        assert line["prompt_tokens"] == [1, 2, user]
        assert line["prompt"] == prepared.user_prompts[user].messages
        assert line["score_chosen"] == pytest.approx(float(reward_C[best]), abs=1e-6)


def text(sample: int, user: str) -> str:
    return f"text {sample} of {user} in round 0"


def test_texts_of_other_users_earn_less_than_their_own():
    workspace, prepared = world.ranked()
    stage = world.make_stage(workspace, "prefer", 0)
    members = load_members(workspace.stage_dir("rank", 0) / "kar.safetensors")
    knowledge = knowledge_of(arms_of(stage.config, workspace, 0)[1], prepared)
    train = lists_in(prepared, TRAIN)
    nobody = np.full(len(prepared.user_id), -1, np.int32)
    own, others = (
        judge(
            members,
            lists_of(prepared, knowledge, stage.config.rank.model_copy(update={"knowledge": how})),
            train,
            nobody,
            k=5,
        )
        for how in ("both", "shuffled")
    )
    assert own.logp_UC[:, 0].mean() > others.logp_UC[:, 0].mean()


def test_a_text_shown_for_someone_else_makes_the_pairs_of_its_owner():
    workspace, prepared = world.ranked()
    stage = world.make_stage(workspace, "prefer", 0, rank=world.RANK | {"knowledge": "shuffled"})
    found = prefer._judged(stage, prepared)
    arm = arms_of(stage.config, workspace, 0)[1]
    members = load_members(arm.file(workspace, 0))
    fold_U = np.load(workspace.stage_dir("rank", 0) / "fold.npz")["fold_U"]
    lists = lists_of(prepared, knowledge_of(arm, prepared), stage.config.rank, stage.config.seed)
    shown = judge(members, lists, lists_in(prepared, TRAIN), fold_U, stage.config.prefer.k)
    owner_U = shuffled_users(prepared.split_U, stage.config.seed)
    for row, user in enumerate(shown.user_U.tolist()):
        (at,) = np.flatnonzero(found.user_U == owner_U[user])
        np.testing.assert_array_equal(found.logp_UC[at], shown.logp_UC[row])
    assert (np.diff(found.user_U) > 0).all()


def test_judges_without_folds_are_refused_where_folds_are_asked_for(tmp_path):
    finished, prepared = world.ranked()
    workspace = world.make_workspace(tmp_path, prepared)
    source, target = (one.stage_dir("rank", 0) for one in (finished, workspace))
    shutil.copytree(source, target)
    members = load_members(target / "kar.safetensors")
    without = dataclasses.replace(members, params_R=members.seed_params, folds=0)
    save_members(target / "kar.safetensors", without)
    with pytest.raises(InputError, match=r"expected 2 folds .* got none; run stage rank again"):
        prefer.run(world.make_stage(workspace, "prefer", 0))


def rewards(ndcg_UC, logp_UC=None, mask_UC=None) -> Rewards:
    ndcg_UC = np.asarray(ndcg_UC, float)
    logp_UC = np.zeros_like(ndcg_UC) if logp_UC is None else np.asarray(logp_UC, float)
    mask_UC = np.ones(ndcg_UC.shape, bool) if mask_UC is None else np.asarray(mask_UC)
    return Rewards(np.arange(len(ndcg_UC), dtype=np.int32), ndcg_UC, logp_UC, mask_UC)


def choose(found: Rewards, texts=("a", "b", "c", "d"), tokens=None, **config):
    tokens = tokens or [(n,) for n in range(len(texts))]
    records = {
        user: [
            TextRecord("user", str(user), one, sample, (), completion)
            for sample, (one, completion) in enumerate(zip(texts, tokens, strict=True))
        ]
        for user in found.user_U.tolist()
    }
    pairs, dropped = choose_pairs(found, found.ndcg_UC, records, PreferConfig(**config), seed=0)
    return [(pair.row, pair.chosen, pair.rejected) for pair in pairs], dict(dropped)


def test_best_is_paired_with_worst():
    assert choose(rewards([[0.3, 0.9, 0.1, 0.5]])) == ([(0, 1, 2)], {})


def test_equal_rewards_are_told_apart_by_likelihood():
    found = rewards([[0.5, 0.5, 0.5, 0.5]], [[-2.0, -1.0, -3.0, -1.5]])
    assert choose(found)[0] == [(0, 1, 2)]
    tie_at_the_top = rewards([[0.9, 0.9, 0.1, 0.5]], [[-2.0, -1.0, -3.0, -1.5]])
    assert choose(tie_at_the_top)[0] == [(0, 1, 2)]


def test_nothing_to_tell_texts_apart_makes_no_pair():
    assert choose(rewards([[0.5, 0.5, 0.5, 0.5]])) == ([], {"within min_gap": 1})


def test_a_gap_within_min_gap_makes_no_pair_not_even_by_likelihood():
    found = rewards([[0.50, 0.54, 0.5, 0.5], [0.1, 0.9, 0.5, 0.5]], [[0, 1, 2, 3], [0, 0, 0, 0]])
    assert choose(found, min_gap=0.05) == ([(1, 1, 0)], {"within min_gap": 1})
    tied = rewards([[0.5, 0.5, 0.5, 0.5]], [[-2.0, -1.0, -3.0, -1.5]])
    assert choose(tied, min_gap=0.01)[0] == []


def test_equal_texts_or_equal_tokens_make_no_pair():
    found = rewards([[0.1, 0.9]])
    assert choose(found, texts=("same", " same ")) == ([], {"equal texts": 1})
    assert choose(found, texts=("a", "b"), tokens=[(1, 2), (1, 2)]) == ([], {"equal texts": 1})


def test_texts_that_are_not_there_are_never_chosen():
    found = rewards([[0.3, 0.2, 9.0, -9.0]], mask_UC=[[True, True, False, False]])
    assert choose(found)[0] == [(0, 0, 1)]


def test_more_pairs_a_user_go_inwards_from_best_and_worst():
    found = rewards([[0.3, 0.9, 0.1, 0.5]])
    assert choose(found, pairs_per_user=2)[0] == [(0, 1, 2), (0, 3, 0)]
    assert choose(found, pairs_per_user=9)[0] == [(0, 1, 2), (0, 3, 0)]


def test_pairs_of_too_different_length_are_left_out():
    found = rewards([[0.1, 0.9]])
    long = [(1,), (1, 2, 3, 4)]
    assert choose(found, ("a", "b"), long, max_length_gap=2)[1] == {"of too different length": 1}
    assert choose(found, ("a", "b"), long, max_length_gap=3)[0] == [(0, 1, 0)]


def test_max_pairs_keeps_the_largest_gaps_in_user_order():
    found = rewards([[0.1, 0.9], [0.1, 0.2], [0.1, 0.5]])
    assert choose(found, ("a", "b"), max_pairs=2)[0] == [(0, 1, 0), (2, 1, 0)]


def test_random_pairs_do_not_follow_the_reward():
    found = rewards(np.tile([[0.1, 0.9]], (200, 1)))
    pairs, _ = choose(found, ("a", "b"), choice="random")
    assert len(pairs) == 200
    assert 60 < sum(chosen == 1 for _, chosen, _ in pairs) < 140


def test_no_pair_at_all_names_the_knob():
    workspace, _ = world.ranked()
    stage = world.make_stage(workspace, "prefer", 0, prefer=world.PREFER | {"min_gap": 10.0})
    with pytest.raises(InputError, match=r"within min_gap\); lower prefer\.min_gap \(now 10\)"):
        prefer.run(stage)
    options = world.PREFER | {"max_length_gap": 1}
    stage = world.make_stage(workspace, "prefer", 0, prefer=options | {"choice": "random"})
    assert prefer._knob("of too different length", stage.config) == (
        "raise prefer.max_length_gap (now 1)"
    )
    assert prefer._knob(prefer.FEW_TEXTS, stage.config) == "raise reason.samples (now 10)"


def test_texts_that_are_all_equal_name_temperature(monkeypatch):
    workspace, prepared = world.ranked()
    same = [replace(record, text="the same") for record in world.make_records(prepared)]
    monkeypatch.setattr(prefer, "read_records", lambda path: same)
    stage = world.make_stage(workspace, "prefer", 0)
    with pytest.raises(InputError, match=r"equal texts\); raise reason\.temperature \(now 1\)"):
        prefer.run(stage)
