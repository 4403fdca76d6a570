"""What --dry-run says, held against the run that follows: within 30 % for tokens and memory."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from preference_pairs import save_tiny_policy

from dpo4rec_jax import train
from dpo4rec_jax.config import Config, load_config
from dpo4rec_jax.data import build
from dpo4rec_jax.runtime import state as training
from dpo4rec_jax.runtime.optimizer import adamw
from dpo4rec_jax.stages.estimate import Estimate, estimate
from dpo4rec_jax.stages.tuning import load, tuning_of
from dpo4rec_jax.weights import load_policy
from dpo4rec_jax.workspace import Workspace

CONFIG = """
rounds: 1
data: {synthetic: {users: 60, items: 30, interactions: 16}}
policy: {path: tiny, tiny_width: 48, tiny_layers: 1}
warmup: {steps: 100}
reason: {samples: 4, max_new_tokens: 40, item_texts: metadata}
encode: {encoder: hashing, features: 32}
rank: {backbone: dlcm, seeds: 1, epochs: 1, batch_lists: 64, embedding: 8}
prefer: {folds: 1}
align: {method: full, epochs: 2}
"""
WITHIN = 0.3


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Estimate, Config]:
    """The workspace up to the pairs, and what was estimated when it was empty."""
    directory = tmp_path_factory.mktemp("estimate")
    (directory / "c.yaml").write_text(CONFIG)
    config = load_config(directory / "c.yaml")
    workdir = directory / "run"
    prepared = build(config.data, config.seed, config.runtime.cache_dir)
    before = estimate(config, Workspace(workdir), prepared)
    stages = "prepare,warmup,round0/reason,round0/encode,round0/rank,round0/prefer"
    arguments = ["--config", str(directory / "c.yaml"), "--workdir", str(workdir)]
    assert train.main([*arguments, "--stages", stages]) == 0
    return workdir, before, config


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_tokens_estimated_before_anything_ran_are_those_of_the_run(ran) -> None:
    workdir, before, config = ran
    texts = lines(workdir / "round0/reason/users.jsonl")
    prompts = {line["user"]: len(line["prompt_tokens"]) for line in texts}
    assert before.texts == len(texts) and before.users.count == len(prompts)
    assert before.users.total == pytest.approx(sum(prompts.values()), rel=0.02)
    assert before.users.longest == max(prompts.values())
    written = sum(len(line["completion_tokens"]) for line in texts)
    assert before.text_tokens == pytest.approx(written, rel=WITHIN)
    assert before.text_mean < config.reason.max_new_tokens / 2  # and not by naming the limit
    sides = ("prompt_tokens", "chosen_tokens", "rejected_tokens")
    pairs = lines(workdir / "round0/prefer/pairs.jsonl")
    trained = sum(len(pair[side]) for pair in pairs for side in sides) * config.align.epochs
    assert before.align_tokens == pytest.approx(trained, rel=WITHIN)


def test_texts_that_are_there_already_say_how_long_the_next_ones_will_be(ran) -> None:
    workdir, _, config = ran
    workspace = Workspace(workdir)
    prepared = build(config.data, config.seed, config.runtime.cache_dir)
    now = estimate(config, workspace, prepared)
    texts = lines(workdir / "round0/reason/users.jsonl")
    assert now.text_mean == pytest.approx(np.mean([len(t["completion_tokens"]) for t in texts]))
    assert now.basis == "as in round 0"


def bytes_of(*trees) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(trees))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_memory_estimated_is_that_of_the_weights_and_the_state_of_training(
    method: str, tmp_path: Path
) -> None:
    path = save_tiny_policy(tmp_path / "policy")
    config = Config.model_validate(
        {
            "data": {"synthetic": {"users": 20, "items": 20, "interactions": 8}},
            "policy": {"path": str(path), "dtype": "float32"},
            "reason": {"samples": 2, "max_new_tokens": 8},
            "align": {"method": method},
        }
    )
    prepared = build(config.data, config.seed, config.runtime.cache_dir)
    found = estimate(config, Workspace(tmp_path / "run"), prepared)
    policy = load_policy(path)
    assert found.bytes_weights == bytes_of(policy.params)
    assert found.basis == "all at the limit" and found.text_mean == 8

    lora = config.align.lora if method == "lora" else None
    tuning = tuning_of(config, load(config, str(path), (), lora), lora, remat="none")
    trainable, frozen = tuning.start(0)
    state = training.create(trainable, adamw(lambda _: 1e-3, max_grad_norm=1.0), 0)
    held = bytes_of(state, frozen) + bytes_of(trainable)  # and a gradient of its size
    assert found.bytes_training == pytest.approx(held, rel=WITHIN)
