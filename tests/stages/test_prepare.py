from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from formats import WRITERS, make_log

from dpo4rec_jax.config import Config
from dpo4rec_jax.data import Prepared
from dpo4rec_jax.runtime.progress import MetricsLog, Progress
from dpo4rec_jax.stages import prepare
from dpo4rec_jax.workspace import Stage, Workspace

FILES = {
    "sequences.npz", "lists.npz", "features.npz", "items.jsonl", "users.jsonl", "prompts.jsonl",
    "counts.json",
}  # fmt: skip


def run(directory: Path, config: Config) -> Path:
    target = directory / "prepare"
    target.mkdir(parents=True)
    log = MetricsLog(directory, "prepare", None)
    workspace = Workspace(directory)
    prepare.run(Stage(config, workspace, "prepare", None, target, log, Progress()))
    return target


def test_prepare_leaves_the_promised_files_and_says_how_much(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = WRITERS["recbole"](tmp_path / "raw", make_log(users=24, items=40, events=12))
    directory = run(
        tmp_path / "run", Config.model_validate({"data": {"name": "x", "path": str(raw)}})
    )
    assert {path.name for path in directory.iterdir()} == FILES
    assert "24 users, 40 items, 288 interactions" in capsys.readouterr().err
    prepared = Prepared.load(directory)
    assert prepared.counts["lists"] == 24 * 2  # 6 after the window, in chunks of 4
    assert [prompt.id for prompt in prepared.user_prompts] == prepared.user_id
    assert [prompt.id for prompt in prepared.item_prompts] == prepared.item_id


def test_the_same_seed_prepares_the_same_bytes(tmp_path: Path) -> None:
    config = Config.model_validate({"data": {"synthetic": {"users": 20, "items": 30}}})
    first, second = run(tmp_path / "a", config), run(tmp_path / "b", config)
    for name in FILES - {"sequences.npz", "lists.npz", "features.npz"}:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    for name in ("sequences.npz", "lists.npz", "features.npz"):
        with np.load(first / name) as ours, np.load(second / name) as theirs:
            assert all((ours[key] == theirs[key]).all() for key in ours.files)
