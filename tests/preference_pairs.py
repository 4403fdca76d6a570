"""A policy of random weights, pairs of token ids for it, and a stage align over them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from rich.console import Console

from dpo4rec_jax.config import Config, PolicyConfig
from dpo4rec_jax.runtime.progress import MetricsLog, Progress
from dpo4rec_jax.weights import export, tiny
from dpo4rec_jax.workspace import Stage, Workspace

WORDS = ("likes", "drama", "crime", "war", "the", "viewer", "and", "loved", "films", "of")
TINY = PolicyConfig(tiny_width=16, tiny_layers=2, tiny_heads=2)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory) -> Iterator[None]:
    """Runs of a module that repeat each other read their compiled programs, as `train` does."""
    before = (
        jax.config.jax_compilation_cache_dir,
        jax.config.jax_persistent_cache_min_compile_time_secs,
    )
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
    reset_cache()


def save_tiny_policy(
    directory: Path, config: PolicyConfig = TINY, words: Iterable[str] = WORDS
) -> Path:
    export.save_policy(tiny.make_tiny(config, words, jax.random.key(1)), directory)
    return directory


def pair_lines(count: int, seed: int = 0, vocabulary: int = 20) -> list[dict[str, Any]]:
    """Chosen completions rise through the ids and rejected ones fall: there is something to learn,
    and no two pairs have the same lengths."""
    rng = np.random.default_rng(seed)
    lines = []
    for number in range(count):
        chosen, rejected = (
            np.sort(rng.integers(6, vocabulary, rng.integers(2, 7))) for _ in range(2)
        )
        lines.append(
            {
                "user": f"u{number}",
                "prompt": [{"role": "user", "content": f"viewer {number}"}],
                "chosen": [{"role": "assistant", "content": "likes drama"}],
                "rejected": [{"role": "assistant", "content": "likes war"}],
                "score_chosen": 0.9,
                "score_rejected": 0.4,
                "prompt_tokens": rng.integers(6, vocabulary, rng.integers(3, 15)).tolist(),
                "chosen_tokens": [*chosen.tolist(), 2],
                "rejected_tokens": [*rejected[::-1].tolist(), 2],
            }
        )
    return lines


def align_stage(path: Path, policy: Path | str, pairs: list[dict[str, Any]], **sections) -> Stage:
    """A stage whose workspace holds these pairs as round 0's."""
    align = {"learning_rate": 3e-3, "beta": 0.1, "batch_pairs": 4, "max_shapes": 1}
    align |= {"log_every": 1, "save_every": 3, "remat": "none"}
    values = {"policy": {"path": str(policy)}} | sections
    values["align"] = align | sections.get("align", {})
    workspace = Workspace(path)
    prefer = workspace.stage_dir("prefer", 0)
    prefer.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in pairs)
    (prefer / "pairs.jsonl").write_text(text, encoding="utf-8")
    directory = workspace.stage_dir("align", 0)
    directory.mkdir(parents=True)
    progress = Progress(Console(file=io.StringIO(), width=200))
    log = MetricsLog(path, "align", 0)
    return Stage(Config.model_validate(values), workspace, "align", 0, directory, log, progress)


def logged(stage: Stage) -> list[dict[str, float]]:
    text = (stage.workspace.path / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def stop_after(stage: Stage, advances: int) -> None:
    """Asks the stage to stop once its bars have moved so often in all."""
    progress, seen = stage.progress, 0
    move = progress.move_bar

    def counting(*arguments: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == advances:
            progress.stop_requested.set()
        move(*arguments)

    progress.move_bar = counting  # type: ignore[method-assign]
