"""The reward check on the synthetic world: what a text says of its user is known there."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dpo4rec_jax import data
from dpo4rec_jax.config import DataConfig
from dpo4rec_jax.data.knowledge import Knowledge
from dpo4rec_jax.data.prepared import TRAIN, Prepared

TOOL = Path(__file__).parents[2] / "tools" / "check_reward.py"


def tool():
    spec = importlib.util.spec_from_file_location("check_reward", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    config = DataConfig.model_validate({"synthetic": {"users": 240, "items": 80, "noise": 0.1}})
    return data.build(config, seed=0, cache_dir="unused")


def told(prepared: Prepared) -> np.ndarray:
    """What a perfect text would say: the mean of the attributes that a user's positives have."""
    sizes = prepared.attribute_IAM.max(axis=(0, 2)) + 1
    shown = [
        (prepared.attribute_IAM[:, a, :, None] == np.arange(size)).any(1)
        for a, size in enumerate(sizes)
    ]
    item_IF = np.concatenate(shown, axis=1).astype(np.float32)
    user_UF = np.zeros((len(prepared.user_id), item_IF.shape[1]), np.float32)
    for user in range(len(user_UF)):
        of_user = prepared.user_L == user
        items = prepared.item_LN[of_user][prepared.label_LN[of_user] == 1]
        if len(items):
            user_UF[user] = item_IF[items].mean(0)
    return user_UF * 4


@pytest.mark.parametrize("informed", [True, False])
def test_texts_that_tell_are_rewarded_and_noise_is_not(
    prepared, informed, tmp_path, monkeypatch, capsys
):
    random = np.random.default_rng(0)
    user_UF = told(prepared)
    if not informed:
        user_UF = random.normal(size=user_UF.shape).astype(np.float32)
    items = random.normal(size=(len(prepared.item_id), user_UF.shape[1])).astype(np.float32)
    ones = np.ones(len(user_UF), np.int32)
    ids = list(prepared.user_id), list(prepared.item_id)
    Knowledge(user_UF[:, None], ones, items, *ids).save(tmp_path / "vectors.npz")
    prepared.save(tmp_path / "prepare")
    settings = ["backbone=prm", "epochs=12", "learning_rate=0.005", "seeds=1"]
    arguments = [
        "--prepared",
        str(tmp_path / "prepare"),
        "--vectors",
        str(tmp_path / "vectors.npz"),
    ]
    monkeypatch.setattr(sys, "argv", ["check_reward", *arguments, "--set", *settings, "--folds=2"])
    tool().main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    print(found)
    assert found["training_users"] == (prepared.split_U == TRAIN).sum()
    if informed:
        assert found["p_value"] < 1e-3 and found["reward_own"] > found["reward_others"]
        assert found["own_chosen_cross_fitted"] > 0.4
    else:
        assert found["p_value"] > 1e-3
        assert abs(found["own_chosen_cross_fitted"] - 0.25) < 0.12
    assert 0 < found["choice_changes"] < 1
