"""Which files lie at `data.path`, and the reader they need."""

from __future__ import annotations

from pathlib import Path

from dpo4rec_jax.config import DataConfig, InputError
from dpo4rec_jax.data import amazon, movielens, recbole, synthetic, table
from dpo4rec_jax.data.fetch import fetch
from dpo4rec_jax.data.files import Files
from dpo4rec_jax.data.ratings import RawData, Select
from dpo4rec_jax.data.resources import RESOURCES

# Told by the names of files, the most telling first.
TELLING = {
    "movielens": movielens.is_movielens,
    "recbole": recbole.is_recbole,
    "amazon": amazon.is_amazon,
    "table": table.is_table,
}


def locate(config: DataConfig, cache_dir: Path) -> tuple[str, Files | None]:
    """The format and the files: what the config says, else what is there or fetched by name.

    Raises InputError where there is no such path, no file of the format, or nothing to fetch.
    """
    if config.format == "synthetic" or (config.name == "synthetic" and config.path is None):
        return "synthetic", None
    if config.path is None and config.name not in RESOURCES:
        fetched = ", ".join(name for name in RESOURCES if ":" not in name)
        raise InputError(
            f"data.name {config.name!r}: nothing to fetch by this name (there are {fetched} and "
            "synthetic); set data.path to the files"
        )
    files = Files(config.path or fetch(config.name, cache_dir))
    fitting = [format for format, told in TELLING.items() if told(files)]
    if config.format != "auto":
        fitting = [format for format in fitting if format == config.format]
    if not fitting:
        wanted = "of a known format" if config.format == "auto" else f"of format {config.format}"
        raise InputError(
            f"{files.path}: no files {wanted}, got {_some(files.names)}; expected ratings.dat or "
            "u.data (movielens), .inter (recbole), .json or .jsonl reviews (amazon), .csv, .tsv "
            "or .parquet (table)"
        )
    return fitting[0], files


def read(
    format: str, files: Files | None, config: DataConfig, seed: int, select: Select
) -> RawData:
    """The raw tables, with the interactions that `select` keeps."""
    if files is None:
        return synthetic.read(config, seed, select)
    if format == "movielens":
        return movielens.read(files, select)
    if format == "amazon":
        return amazon.read(files, select)
    return (recbole if format == "recbole" else table).read(files, config, select)


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")
