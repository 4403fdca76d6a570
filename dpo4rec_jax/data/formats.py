"""Which files lie at `data.path`, and the reader they need."""

from __future__ import annotations

from pathlib import Path

from dpo4rec_jax.config import DataConfig, InputError
from dpo4rec_jax.data import movielens, recbole, synthetic, table
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
    if recbole.is_recbole(files):
        return "recbole", files
    if table.is_table(files):
        return "table", files
    raise InputError("data.path: not read yet")


def read(
    format: str, source: Files | None, config: DataConfig, seed: int, select: Select
) -> RawData:
    if source is None:
        return synthetic.read(config, seed, select)
    if format == "recbole":
        return recbole.read(source, config, select)
    if format == "table":
        return table.read(source, config, select)
    return movielens.read(source, select)
