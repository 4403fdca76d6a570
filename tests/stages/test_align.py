"""Stage align on a small random policy: what it leaves, logs, refuses, and how it goes on."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from preference_pairs import (
    align_stage,
    compiled_once,  # noqa: F401
    logged,
    pair_lines,
    save_tiny_policy,
    stop_after,
)

from dpo4rec_jax.config import AlignConfig, InputError, RuntimeConfig
from dpo4rec_jax.runtime.checkpoint import load_arrays
from dpo4rec_jax.runtime.progress import Stopped
from dpo4rec_jax.stages import align
from dpo4rec_jax.weights import load_policy
from dpo4rec_jax.workspace import write_jsonl

PAIRS = pair_lines(20)


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


def adapter(stage) -> bytes:
    return (stage.directory / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(policy, tmp_path_factory):
    adapters = {"rank": 4, "dropout": 0.1, "targets": ["q", "up"]}
    options = {"epochs": 4, "microbatch_pairs": 2, "lora": adapters}
    stage = align_stage(tmp_path_factory.mktemp("run"), policy, PAIRS, align=options)
    align.run(stage)
    return stage


def test_first_step_has_loss_log_two_and_no_rewards(finished):
    first = next(line for line in logged(finished) if line["step"] == 1)
    # Dropout on adapters whose B is zero changes nothing.
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "margin", "kl"):
        assert first[name] == pytest.approx(0, abs=1e-5)


def test_every_interval_logs_its_figures(finished):
    steps = [line for line in logged(finished) if "grad_norm" in line]
    assert [line["step"] for line in steps] == list(range(1, 21))  # 19 pairs: 5 steps an epoch
    expected = {*align.FIGURES, "loss", "grad_norm", "learning_rate", "pairs_per_second"}
    assert expected | {"tokens_per_second", "seconds_compiling"} <= steps[-1].keys()
    assert steps[-1]["grad_norm"] > 0


def test_training_raises_margin_and_accuracy_and_lowers_the_loss(finished):
    steps = [line for line in logged(finished) if "grad_norm" in line]
    last = steps[-5:]
    assert np.mean([line["loss"] for line in last]) < math.log(2) - 0.01
    assert np.mean([line["margin"] for line in last]) > 0.01
    assert np.mean([line["accuracy"] for line in last]) > 0.6


def test_held_out_pairs_are_evaluated_before_and_after(finished):
    summary = json.loads((finished.directory / "summary.json").read_text())
    assert (summary["pairs"], summary["pairs_held_out"], summary["steps"]) == (19, 1, 20)
    assert summary["before"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert summary["after"]["loss"] != summary["before"]["loss"]
    assert summary["reward_accuracy"] == summary["after"]["accuracy"]
    held_out = [line for line in logged(finished) if "heldout/loss" in line]
    assert [line["step"] for line in held_out] == [0, 20]


def test_adapter_loads_as_the_policy_of_the_next_round(finished, policy):
    before, after = (
        load_policy(policy),
        load_policy(
            *finished.workspace.policy_source(finished.config, 1)[:1],
            adapters=finished.workspace.policy_source(finished.config, 1)[1],
        ),
    )
    tokens, length = np.array([[7, 8, 9]], np.int32), np.array([3], np.int32)
    assert not np.allclose(before.logits(tokens, length), after.logits(tokens, length))


def test_checkpoints_are_gone_once_their_result_is_saved(finished):
    names = {path.name for path in finished.directory.iterdir()}
    assert names == {"adapter", "before.json", "reference.npz", "summary.json"}


@pytest.mark.parametrize("advances", [29, 33])
def test_killed_run_continues_to_the_same_bits(finished, policy, tmp_path, advances):
    """Stopped in the middle of an accumulation as well: a step is two microbatches."""
    stage = align_stage(tmp_path, policy, PAIRS, align=finished.config.align.model_dump())
    stop_after(stage, advances)
    with pytest.raises(Stopped):
        align.run(stage)
    assert not (stage.directory / "adapter").exists()
    kept = [int(path.name) for path in (stage.directory / "checkpoints").iterdir()]
    assert max(kept) > 2
    stage.progress.stop_requested.clear()
    align.run(stage)
    assert adapter(stage) == adapter(finished)
    steps = [line["step"] for line in logged(stage) if "grad_norm" in line]
    assert steps == list(range(1, 21))


def test_reference_is_computed_once_and_kept_under_weights_and_tokens(finished, policy, tmp_path):
    kept = finished.directory / "reference.npz"
    stage = align_stage(tmp_path, policy, PAIRS)
    (stage.directory / "reference.npz").write_bytes(kept.read_bytes())
    rows = align.rows_of(align.read_pairs(tmp_path / "round0" / "prefer" / "pairs.jsonl"))
    loaded = load_policy(policy)
    tuning = align.tuning_of(stage.config, loaded, None, remat="none")

    def forbidden(*_):
        raise AssertionError("computed again")

    object.__setattr__(tuning, "policy_logps", forbidden)
    with np.load(kept) as file:
        np.testing.assert_array_equal(
            align.reference_logps(stage, tuning, rows, size=2), file["logp_BP"]
        )
    other = align.rows_of(align.read_pairs(tmp_path / "round0" / "prefer" / "pairs.jsonl")[1:])
    with pytest.raises(AssertionError, match="computed again"):
        align.reference_logps(stage, tuning, other, size=2)


def weights(stage):
    return load_arrays(stage.directory / "policy" / "model.safetensors")


def test_full_fine_tuning_is_the_same_in_one_batch_and_in_unequal_microbatches(policy, tmp_path):
    """Batches of 6 in microbatches of 4 and 2, the last one padded; and 19 = 3 x 6 + 1."""
    options = {"method": "full", "batch_pairs": 6, "weight_decay": 0.1}
    whole = align_stage(tmp_path / "whole", policy, PAIRS, align=options)
    cut = align_stage(tmp_path / "cut", policy, PAIRS, align=options | {"microbatch_pairs": 4})
    align.run(whole)
    align.run(cut)
    before = load_arrays(policy / "model.safetensors")
    for name, value in weights(whole).items():
        np.testing.assert_allclose(weights(cut)[name], value, atol=2e-5, err_msg=name)
    assert not np.allclose(
        weights(whole)["model.embed_tokens.weight"], before["model.embed_tokens.weight"]
    )


def test_run_that_diverges_stops_with_what_to_change(policy, tmp_path):
    stage = align_stage(
        tmp_path,
        policy,
        PAIRS,
        align={"method": "full", "learning_rate": 1e30, "epochs": 4, "warmup_fraction": 0.0},
    )
    with pytest.raises(InputError, match=r"not finite in 5 steps in a row.*align\.learning_rate"):
        align.run(stage)


def poisoned(monkeypatch, steps):
    """The loss is NaN in these steps (counted from 1, of one microbatch each)."""
    make = align.preference_loss

    def preference_loss(tuning, config):
        loss, taken = make(tuning, config), []

        def with_nan(trainable, frozen, batch, key):
            sums = loss(trainable, frozen, batch, key)
            if key is None:  # held-out pairs
                return sums
            poison = jnp.isin(batch["index_B"][0], jnp.asarray(taken))
            return sums._replace(loss=jnp.where(poison, jnp.nan, sums.loss))

        original = align.shuffled

        def shuffled(*arguments, **options):
            microbatches = original(*arguments, **options)
            taken.extend(microbatches[step - 1].rows[0] for step in steps)
            return microbatches

        monkeypatch.setattr(align, "shuffled", shuffled)
        return with_nan

    monkeypatch.setattr(align, "preference_loss", preference_loss)


ONE_EPOCH = {"method": "full", "batch_pairs": 2, "epochs": 1}  # 19 pairs: 10 steps


def test_a_step_of_nan_is_skipped_counted_and_said(policy, tmp_path, monkeypatch):
    poisoned(monkeypatch, [2, 4, 5])
    stage = align_stage(tmp_path, policy, PAIRS, align=ONE_EPOCH)
    align.run(stage)
    assert json.loads((stage.directory / "summary.json").read_text())["steps_skipped"] == 3
    said = stage.progress.console.file.getvalue()
    assert "3 of 10 steps skipped, their loss or gradient was not finite; lower align.learn" in said
    for name, value in weights(stage).items():
        assert np.isfinite(value).all(), name


def test_nan_in_a_row_stops_with_the_batches_and_the_last_good_state(policy, tmp_path, monkeypatch):
    poisoned(monkeypatch, [4, 5])
    options = {"align": ONE_EPOCH, "runtime": {"max_skipped": 2}}
    stage = align_stage(tmp_path / "stopped", policy, PAIRS, **options)
    with pytest.raises(InputError, match=r"not finite in 2 steps in a row, up to step 5.*"):
        align.run(stage)
    diagnosis = json.loads((stage.directory / "diagnosis.json").read_text())
    assert [skipped["step"] for skipped in diagnosis["skipped"]] == [4, 5]
    rows = [skipped["rows"] for skipped in diagnosis["skipped"]]
    assert [len(names) for names in rows] == [2, 2]
    assert all(name.startswith("pairs.jsonl:") for names in rows for name in names)
    assert diagnosis["skipped"][0]["loss"] == "nan"

    further = dataclasses.replace(
        stage, config=stage.config.model_copy(update={"runtime": RuntimeConfig(max_skipped=3)})
    )
    align.run(further)
    whole = align_stage(tmp_path / "whole", policy, PAIRS, align=ONE_EPOCH)
    align.run(whole)
    for name, value in weights(whole).items():
        np.testing.assert_array_equal(weights(further)[name], value, err_msg=name)


def test_a_policy_that_drifts_or_diverges_is_doubted_with_the_knob():
    before = {"loss": math.log(2), "logps/chosen": -200.0}
    config = AlignConfig(beta=0.01)
    assert not list(align.doubts(before, before, config))
    assert not list(align.doubts({}, {}, config))
    (worse,) = align.doubts(before, before | {"loss": 0.8}, config)
    assert worse.startswith("the loss of held-out pairs rose from 0.693 to 0.800")
    assert "align.learning_rate (now 1e-05)" in worse
    (drift,) = align.doubts(before, {"loss": 0.6, "logps/chosen": -350.0}, config)
    assert "less likely by 150 nats" in drift and "align.beta" in drift


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [], r"no pairs to train on"),
        (lambda lines: ["{", *lines], r"pairs\.jsonl:1: not a pair"),
        (lambda lines: [*lines, '{"prompt_tokens": [1]}'], r"pairs\.jsonl:21: not a pair"),
        (
            lambda lines: [json.dumps(json.loads(lines[0]) | {"chosen_tokens": []})],
            r"pairs\.jsonl:1: a prompt or completion without tokens",
        ),
        (
            lambda lines: [json.dumps(json.loads(lines[0]) | {"chosen_tokens": [10**6]})],
            r"pairs\.jsonl:1: expected token ids below 26, got 1000000",
        ),
    ],
)
def test_damaged_pairs_are_the_users_one_line(policy, tmp_path, damage, message):
    stage = align_stage(tmp_path, policy, PAIRS)
    path = tmp_path / "round0" / "prefer" / "pairs.jsonl"
    path.write_text("".join(f"{line}\n" for line in damage(path.read_text().splitlines())))
    with pytest.raises(InputError, match=message):
        align.run(stage)


def test_texts_may_hold_what_unicode_calls_line_ends(policy, tmp_path):
    align_stage(tmp_path, policy, PAIRS)
    path = tmp_path / "round0" / "prefer" / "pairs.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["chosen"][0]["content"] = "likes\u2028drama\u0085and war"
    write_jsonl(path, lines)
    assert len(align.read_pairs(path)) == len(lines)


def test_held_out_users_are_held_out_with_all_their_pairs():
    pairs = [align.Pair(f"u{number // 2}", (1,), (2,), (3,), 0.1) for number in range(40)]
    held_out = align.held_out_rows(pairs, 0.1, seed=0)
    assert held_out.sum() == 4
    assert {pairs[i].user for i in np.flatnonzero(held_out)}.isdisjoint(
        pairs[i].user for i in np.flatnonzero(~held_out)
    )
    assert not align.held_out_rows(pairs[:10], 0.1, seed=0).any()
    assert not align.held_out_rows(pairs, 0.0, seed=0).any()
