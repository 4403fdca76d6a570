"""Which files lie at `data.path`, and the reader they need."""

from __future__ import annotations

from pathlib import Path

from dpo4rec_jax.config import DataConfig, InputError
from dpo4rec_jax.data import synthetic
from dpo4rec_jax.data.ratings import RawData, Select


def locate(config: DataConfig, cache_dir: Path) -> tuple[str, Path | None]:
    """The format and the files: what the config says, else what is there or fetched by name."""
    if config.format == "synthetic" or (config.name == "synthetic" and config.path is None):
        return "synthetic", None
    raise InputError("data.path: not read yet")


def read(
    format: str, source: Path | None, config: DataConfig, seed: int, select: Select
) -> RawData:
    return synthetic.read(config, seed, select)
