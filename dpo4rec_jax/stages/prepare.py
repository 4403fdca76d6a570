"""Stage prepare, once a run: raw logs and metadata to sequences, lists and prompts."""

from __future__ import annotations

from dpo4rec_jax.data import build
from dpo4rec_jax.workspace import Stage


def run(stage: Stage) -> None:
    config = stage.config
    prepared = build(config.data, config.seed, config.runtime.cache_dir)
    prepared.save(stage.directory)
    numbers = {k: float(v) for k, v in prepared.counts.items() if isinstance(v, int)}
    stage.log.write(0, numbers)
