"""What a data set's domain implies where the config leaves a key at null."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dpo4rec_jax.config import DataConfig

HINTS = {  # in a data set's name, or a file's or directory's
    "movies": re.compile(r"(?<![a-z])ml-(\d|latest)|movie|film|netflix"),
    "books": re.compile(r"(?<!note)book"),
    "beauty": re.compile(r"beauty|personal_care|cosmetic"),
}


@dataclass(frozen=True)
class Protocol:
    """KAR's settings: `window` in interactions, `threshold` in stars, the k-core's bounds."""

    domain: str
    window: int
    threshold: float
    min_user: int | None
    min_item: int | None


def protocol(config: DataConfig, format: str) -> Protocol:
    """Settings for data laid out in `format`; where the config gives one, it stands."""
    domain = domain_of(config, format)
    movies = domain in ("movies", "synthetic")
    books = config.name == "amazon-books"
    return Protocol(
        domain=domain,
        window=config.window or (30 if movies else 15),
        threshold=_given(config.rating_threshold, 3.0 if movies else 4.0),
        min_user=config.min_user_interactions or (60 if books else None),
        min_item=config.min_item_interactions or (40 if books else None),
    )


def domain_of(config: DataConfig, format: str) -> str:
    """The wording to use: as configured, else told from the format, the name, or the part of the
    path nearest to the data."""
    if config.domain != "auto":
        return config.domain
    if format in ("synthetic", "movielens"):
        return "synthetic" if format == "synthetic" else "movies"
    parts = Path(config.path).parts[::-1] if config.path else ()
    for named in (config.name, *parts):
        for domain, words in HINTS.items():
            if words.search(named.lower()):
                return domain
    return "products"


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
