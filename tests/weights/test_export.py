"""What we write: the same bits back, and the same logits in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_models
import jax
import numpy as np
import pytest

from dpo4rec_jax.config import InputError
from dpo4rec_jax.weights import load_policy
from dpo4rec_jax.weights.export import save_policy

TOKENS_BT = np.random.default_rng(1).integers(0, hf_models.VOCAB, (2, 12))
MESSAGES = [{"role": "user", "content": "word1 word2"}]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    def make(name: str) -> Path:
        return hf_models.save_model(hf_models.make_model(name), tmp_path_factory.mktemp(name))

    return make


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama-3.2", "qwen-3"])
def test_round_trip_is_bitwise(
    name: str, param_dtype: str, checkpoints: Any, tmp_path: Path
) -> None:
    policy = load_policy(checkpoints(name), param_dtype=param_dtype)
    save_policy(policy, tmp_path / "export", shard_bytes=20_000)
    assert len(list((tmp_path / "export").glob("model-*.safetensors"))) > 1
    again = load_policy(tmp_path / "export", param_dtype=param_dtype)
    assert again.config == policy.config
    jax.tree.map(np.testing.assert_array_equal, again.params, policy.params)
    assert again.stop_ids == policy.stop_ids
    assert again.chat_ids(MESSAGES) == policy.chat_ids(MESSAGES)


@pytest.mark.parametrize("name", ["llama-3.1", "llama-3.2", "mistral", "qwen-2"])
def test_transformers_gives_the_same_logits_of_our_export(
    name: str, checkpoints: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    policy = load_policy(checkpoints(name))
    save_policy(policy, tmp_path / "export", shard_bytes=20_000)
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = hf_models.hf_logits(theirs, TOKENS_BT)
    ours = policy.logits(TOKENS_BT, np.array([12, 12]))
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)


def test_tied_embedding_is_stored_once(checkpoints: Any, tmp_path: Path) -> None:
    save_policy(load_policy(checkpoints("llama-3.2")), tmp_path / "export")
    stored = (tmp_path / "export" / "model.safetensors").read_bytes()
    header = json.loads(stored[8 : 8 + int.from_bytes(stored[:8], "little")])
    assert "lm_head.weight" not in header
    assert header["__metadata__"] == {"format": "pt"}


def test_generation_config_names_every_stop_id(checkpoints: Any, tmp_path: Path) -> None:
    policy = load_policy(checkpoints("llama-3"))
    save_policy(policy, tmp_path / "export")
    written = json.loads((tmp_path / "export" / "generation_config.json").read_text())
    assert written["eos_token_id"] == list(policy.stop_ids)


def test_export_replaces_an_export_but_nothing_else(checkpoints: Any, tmp_path: Path) -> None:
    policy = load_policy(checkpoints("llama-3"))
    target = tmp_path / "target"
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="expected an empty or new directory"):
        save_policy(policy, target)
    assert (target / "thesis.tex").exists()
    save_policy(policy, tmp_path / "export", shard_bytes=20_000)
    save_policy(policy, tmp_path / "export")
    assert [file.name for file in (tmp_path / "export").glob("*.safetensors")] == [
        "model.safetensors"
    ]
    assert not list(tmp_path.glob("*.partial"))
