"""What a data set's domain implies where the config leaves a key at null."""

from __future__ import annotations

from dataclasses import dataclass

from dpo4rec_jax.config import DataConfig


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
    """The wording to use: as configured, else told from the format, the name or the path."""
    if config.domain != "auto":
        return config.domain
    if format in ("synthetic", "movielens"):
        return "synthetic" if format == "synthetic" else "movies"
    named = f"{config.name} {config.path or ''}".lower()
    hints = {"movies": ("ml-", "movie", "film", "netflix"), "books": ("book",)}
    hints["beauty"] = ("beauty", "personal_care", "cosmetic")
    for domain, words in hints.items():
        if any(word in named for word in words):
            return domain
    return "products"


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
