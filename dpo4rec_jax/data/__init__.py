"""Raw logs to prepared data: `build` does everything that stage prepare does besides saving."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from dpo4rec_jax.config import DataConfig
from dpo4rec_jax.data import formats, sequences, synthetic
from dpo4rec_jax.data.assembly import assemble
from dpo4rec_jax.data.prepared import SPLITS, TEST, TRAIN, VALIDATION, Prepared
from dpo4rec_jax.data.prompts import DOMAINS, Prompt, shorten
from dpo4rec_jax.data.protocol import protocol

__all__ = ["SPLITS", "TEST", "TRAIN", "VALIDATION", "Prepared", "Prompt", "build", "shorten"]


def build(config: DataConfig, seed: int, cache_dir: str | Path) -> Prepared:
    """Reads (fetching where there is no path), selects, cuts into lists and words the prompts.

    Raises InputError, one line with file and line number where there is one, for whatever the
    data or the config make impossible.
    """
    format, source = formats.locate(config, Path(cache_dir).expanduser())
    settings = protocol(config, format)

    def select(interactions: pl.DataFrame) -> pl.DataFrame:
        return sequences.select(
            interactions,
            min_user=settings.min_user,
            min_item=settings.min_item,
            max_users=config.max_users,
        )

    raw = formats.read(format, source, config, seed, select)
    wording = synthetic.DOMAIN if settings.domain == "synthetic" else DOMAINS[settings.domain]
    return assemble(raw, config, settings, seed, wording)
