"""`python -m dpo4rec_jax.export` on the workspace of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file

from dpo4rec_jax import export
from dpo4rec_jax.config import Config, dump_config
from dpo4rec_jax.data.knowledge import Knowledge
from dpo4rec_jax.models import lora
from dpo4rec_jax.weights import load_policy, peft
from dpo4rec_jax.weights.export import save_policy
from dpo4rec_jax.weights.tiny import make_tiny
from dpo4rec_jax.workspace import Workspace, write_json

MANIFEST = {"inputs_digest": "", "outputs_digest": "", "files": {}, "seconds": 0.0}

TOKENS_BT, LENGTH_B = np.array([[6, 7, 8, 9]]), np.array([4])


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """What a run of two rounds leaves of what is exported: base, adapters, vectors."""
    config = Config.model_validate(
        {
            "rounds": 2,
            "policy": {"tiny_width": 16, "tiny_heads": 2, "dtype": "float32"},
            "align": {"lora": {"rank": 2, "alpha": 4.0}},
        }
    )
    workspace = Workspace(tmp_path / "run")
    workspace.path.mkdir()
    (workspace.path / "config.yaml").write_text(dump_config(config))
    policy = make_tiny(config.policy, ["drama", "horror", "likes"], jax.random.key(0))
    save_policy(policy, workspace.stage_dir("warmup") / "policy")
    for round_ in range(2):
        fresh = lora.init(policy.config, config.align.lora, jax.random.key(round_))
        adapter = jax.tree.map(
            lambda leaf: leaf + jax.random.normal(jax.random.key(9 + round_), leaf.shape) / 4,  # noqa: B023
            fresh,
        )
        directory = workspace.stage_dir("align", round_)
        peft.save_adapter(directory / "adapter", policy.config, adapter, config.align.lora)
        write_json(directory / "manifest.json", MANIFEST)
    generator = np.random.default_rng(0)
    encoded = workspace.stage_dir("encode", 2)
    encoded.mkdir(parents=True)
    Knowledge(
        generator.normal(size=(3, 2, 5)).astype(np.float32),
        np.array([2, 0, 1], np.int32),
        generator.normal(size=(4, 5)).astype(np.float32),
        ["u1", "u2", "u3"],
        ["i1", "i2", "i3", "i4"],
    ).save(encoded / "vectors.npz")
    write_json(encoded / "manifest.json", MANIFEST)
    return workspace.path


def run(workdir: Path, name: str, to: Path, *more: str) -> int:
    return export.main(["--workdir", str(workdir), "--format", name, "--to", str(to), *more])


def test_exported_policy_is_the_base_with_both_rounds_merged(workdir: Path, tmp_path: Path) -> None:
    assert run(workdir, "hf", tmp_path / "out") == 0
    adapters = [workdir / f"round{r}/align/adapter" for r in range(2)]
    expected = load_policy(workdir / "warmup/policy", adapters=adapters)
    exported = load_policy(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, exported.params, expected.params)
    assert run(workdir, "hf", tmp_path / "out", "--dtype", "bfloat16") == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype.name for value in stored.values()} == {"bfloat16"}


def test_exported_adapter_adds_what_both_rounds_add(workdir: Path, tmp_path: Path) -> None:
    assert run(workdir, "peft", tmp_path / "out") == 0
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["r"] == 4
    assert written["base_model_name_or_path"] == str(workdir / "warmup/policy")
    assert run(workdir, "hf", tmp_path / "whole") == 0
    adapted = load_policy(workdir / "warmup/policy", adapters=[tmp_path / "out"])
    expected = load_policy(tmp_path / "whole").logits(TOKENS_BT, LENGTH_B)
    np.testing.assert_allclose(adapted.logits(TOKENS_BT, LENGTH_B), expected, atol=1e-5, rtol=0)


def test_exported_knowledge_pairs_vectors_with_ids(workdir: Path, tmp_path: Path) -> None:
    assert run(workdir, "knowledge", tmp_path / "out") == 0
    vectors = load_file(tmp_path / "out" / "knowledge.safetensors")
    held = Knowledge.load(workdir / "round2/encode/vectors.npz")
    np.testing.assert_array_equal(vectors["user_UxCxF"], held.user_UCF)
    np.testing.assert_array_equal(vectors["item_IxF"], held.item_IF)
    users = pl.read_parquet(tmp_path / "out" / "users.parquet")
    assert users.rows() == [(0, "u1", 2), (1, "u2", 0), (2, "u3", 1)]
    items = pl.read_parquet(tmp_path / "out" / "items.parquet")
    assert items["item"].to_list() == ["i1", "i2", "i3", "i4"]


def unaligned(workdir: Path) -> None:
    (workdir / "round1/align/manifest.json").unlink()


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("hf", unaligned, "round 1 is not aligned yet"),
        ("peft", unaligned, "round 1 is not aligned yet"),
        (
            "knowledge",
            lambda path: (path / "round2/encode/manifest.json").unlink(),
            "no round is encoded yet",
        ),
        ("hf", lambda path: (path / "config.yaml").unlink(), "got no config.yaml"),
    ],
)
def test_unfinished_run_is_one_line_and_status_2(
    name: str,
    damage: Any,
    says: str,
    workdir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(workdir)
    assert run(workdir, name, tmp_path / "out") == 2
    message = capsys.readouterr().err.strip()
    assert says in message and "\n" not in message
