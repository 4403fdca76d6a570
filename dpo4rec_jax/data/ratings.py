"""The tables every reader fills, whatever the files look like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

INTERACTIONS = {"user": pl.String, "item": pl.String, "time": pl.Int64, "rating": pl.Float32}

# Given all interactions in file order, the rows to keep. Readers call it before they read item
# metadata, so that they can pass over the items nobody needs.
Select = Callable[[pl.DataFrame], pl.DataFrame]


@dataclass(frozen=True)
class RawData:
    """A data set as three tables keyed by raw ids.

    `interactions`: user, item, time, rating (null: none), in file order.
    `items`: item, title (null: unknown), and one column of list[str] for each attribute.
    `users`: user, and one column of str for each attribute of the user's profile.
    Items and users without a row, and rows nobody interacted with, are both allowed.
    """

    interactions: pl.DataFrame
    items: pl.DataFrame
    users: pl.DataFrame

    @property
    def has_ratings(self) -> bool:
        return self.interactions["rating"].null_count() < self.interactions.height


def no_items() -> pl.DataFrame:
    return pl.DataFrame(schema={"item": pl.String, "title": pl.String})


def no_users() -> pl.DataFrame:
    return pl.DataFrame(schema={"user": pl.String})
