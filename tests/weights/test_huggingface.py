"""Hugging Face directories: what loads, and the one line that says why another does not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_models
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpo4rec_jax.config import InputError
from dpo4rec_jax.weights import hf_config, load_policy
from dpo4rec_jax.weights.tiny import make_tokenizer

TOKENS_BT, LENGTH_B = np.array([[3, 4, 5, 6]]), np.array([4])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with nothing wrong, in shards."""
    directory = tmp_path_factory.mktemp("sound")
    model = hf_models.make_model("llama-3.1")
    model.save_pretrained(directory, max_shard_size="20KB")
    hf_models.save_model(model, directory / "whole")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(directory / "whole" / file, directory / file)
    return directory


@pytest.fixture
def checkpoint(sound: Path, tmp_path: Path) -> Path:
    """A single-file copy to damage."""
    return Path(shutil.copytree(sound / "whole", tmp_path / "checkpoint"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(directory: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def one_line(path: Path, **options: Any) -> str:
    """The message of the InputError that loading raises."""
    with pytest.raises(InputError) as caught:
        load_policy(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_shards_hold_what_one_file_holds(sound: Path) -> None:
    assert len(list(sound.glob("model-*.safetensors"))) > 3
    a, b = load_policy(sound), load_policy(sound / "whole")
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def test_both_spellings_of_rope_scaling_mean_the_same(sound: Path) -> None:
    values = json.loads((sound / "config.json").read_text())
    rope = values.pop("rope_parameters")
    new = hf_config.parse_config({**values, "rope_parameters": rope}, "new")
    theta = rope.pop("rope_theta")
    old = hf_config.parse_config({**values, "rope_theta": theta, "rope_scaling": rope}, "old")
    older = {("type" if key == "rope_type" else key): value for key, value in rope.items()}
    oldest = {**values, "rope_theta": theta, "rope_scaling": older}
    assert new == old == hf_config.parse_config(oldest, "oldest")
    assert new.rope_theta == 500000.0
    assert new.rope_scaling is not None and new.rope_scaling.original_max_position == 8192


def test_derived_tensors_and_tied_copies_are_accounted_for(checkpoint: Path) -> None:
    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    edit_json(checkpoint / "config.json", lambda c: c.update(tie_word_embeddings=True))
    edit_tensors(checkpoint, add)
    policy = load_policy(checkpoint)
    assert policy.config.tied and "unembed" not in policy.params
    edit_tensors(checkpoint, lambda t: t["lm_head.weight"].__setitem__((0, 0), 9.0))
    assert "lm_head.weight: expected the embedding itself" in one_line(checkpoint)


def test_half_precision_weights_load_in_the_dtype_asked_for(checkpoint: Path) -> None:
    expected = np.asarray(load_policy(checkpoint).params["embed"])
    for dtype in (np.float16, ml_dtypes.bfloat16):
        edit_tensors(
            checkpoint,
            lambda t: t.update({k: v.astype(dtype) for k, v in t.items()}),  # noqa: B023
        )
        expected = expected.astype(dtype)
        embed = load_policy(checkpoint).params["embed"]
        assert embed.dtype == np.float32
        np.testing.assert_array_equal(embed, expected.astype(np.float32))


def setting(**values: Any) -> Callable[[Path], None]:
    return lambda path: edit_json(path / "config.json", lambda config: config.update(values))


def test_an_output_matrix_that_is_missing_is_named(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.pop("lm_head.weight"))
    says = r"lm_head\.weight: expected \[97, 48\], got no such tensor"
    assert re.search(says, one_line(checkpoint))


def test_far_smaller_tokenizer_is_that_of_another_model(checkpoint: Path) -> None:
    from dpo4rec_jax.weights.tokenizer import check_fit

    with pytest.raises(InputError, match="86 ids, the embedding 49152 rows"):
        check_fit(make_tokenizer([f"word{index}" for index in range(40)]), 49152, "here")


def test_mixed_sliding_layers_are_refused(checkpoint: Path) -> None:
    kinds = ["full_attention", "sliding_attention"]
    setting(model_type="qwen2", use_sliding_window=True, sliding_window=4, layer_types=kinds)(
        checkpoint
    )
    assert "layer_types: expected one kind of attention" in one_line(checkpoint)


def test_what_is_neither_directory_nor_hub_id_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "a" / "b"
    assert "expected a Hugging Face directory, a hub id" in one_line(missing)
    with pytest.raises(InputError, match=r"policy\.dtype: expected auto, float32 or bfloat16"):
        load_policy(missing, dtype="float64")


def test_failing_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("cannot resolve the host\nfor several\nreasons")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = one_line(Path("some-owner/some-model"))
    assert "hub did not give it (ConnectionError: cannot resolve the host);" in message


def test_hub_id_loads_what_the_hub_gives(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def give(name: str, **options: Any) -> str:
        asked.append((name, "*.bin" in str(options["allow_patterns"])))
        return str(sound)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    assert load_policy("some-owner/some-model").config.width == 48
    assert asked == [("some-owner/some-model", False)]


def test_logits_refuse_what_is_not_a_batch_of_ids(sound: Path) -> None:
    policy = load_policy(sound)
    with pytest.raises(InputError, match=r"expected ids from 0 to 96, got 3 to 97"):
        policy.logits(np.array([[3, 97]]), np.array([2]))
    with pytest.raises(InputError, match=r"expected lengths from 0 to 4, got 5 to 5"):
        policy.logits(TOKENS_BT, np.array([5]))
    with pytest.raises(InputError, match=r"expected tokens \[B, T\] and lengths \[B\]"):
        policy.logits(TOKENS_BT[0], LENGTH_B)
    assert policy.logits(TOKENS_BT.astype(np.int64), LENGTH_B).shape == (1, 4, 97)
    assert policy.logits(jax.numpy.asarray(TOKENS_BT), LENGTH_B).dtype == np.float32
