"""Which files lie at `data.path`, and the reader they need."""

from __future__ import annotations

from pathlib import Path

from dpo4rec_jax.config import DataConfig, InputError
from dpo4rec_jax.data import movielens, synthetic
from dpo4rec_jax.data.files import Files
from dpo4rec_jax.data.ratings import RawData, Select


def locate(config: DataConfig, cache_dir: Path) -> tuple[str, Files | None]:
    """The format and the files: what the config says, else what is there or fetched by name."""
    if config.format == "synthetic" or (config.name == "synthetic" and config.path is None):
        return "synthetic", None
    if config.path is None:
        raise InputError("data.path: not read yet")
    files = Files(config.path)
    if movielens.is_movielens(files):
        return "movielens", files
    raise InputError("data.path: not read yet")


def read(
    format: str, source: Files | None, config: DataConfig, seed: int, select: Select
) -> RawData:
    if source is None:
        return synthetic.read(config, seed, select)
    return movielens.read(source, select)
