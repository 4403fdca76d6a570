"""Raw logs to prepared data: `build` does everything that stage prepare does besides saving."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from dpo4rec_jax.config import DataConfig, InputError
from dpo4rec_jax.data import formats, sequences, synthetic
from dpo4rec_jax.data.assembly import assemble
from dpo4rec_jax.data.prepared import SPLITS, TEST, TRAIN, VALIDATION, Prepared
from dpo4rec_jax.data.prompts import DOMAINS, Prompt, customise, shorten
from dpo4rec_jax.data.protocol import protocol

__all__ = ["SPLITS", "TEST", "TRAIN", "VALIDATION", "Prepared", "Prompt", "build", "shorten"]


def build(config: DataConfig, seed: int, cache_dir: str | Path) -> Prepared:
    """Reads (fetching where there is no path), selects, cuts into lists and words the prompts.

    Raises InputError, one line with file and line number where there is one, for whatever the
    data or the config make impossible.
    """
    if config.positives_per_list >= config.list_length:
        raise InputError(
            f"data.positives_per_list: expected less than data.list_length {config.list_length}, "
            f"got {config.positives_per_list}"
        )
    format, files = formats.locate(config, Path(cache_dir).expanduser())
    settings = protocol(config, format)
    wording = synthetic.DOMAIN if settings.domain == "synthetic" else DOMAINS[settings.domain]
    domain = customise(wording, config.prompts)

    def select(interactions: pl.DataFrame) -> pl.DataFrame:
        return sequences.select(
            interactions,
            min_user=settings.min_user,
            min_item=settings.min_item,
            max_users=config.max_users,
        )

    raw = formats.read(format, files, config, seed, select)
    return assemble(raw, config, settings, seed, domain)
