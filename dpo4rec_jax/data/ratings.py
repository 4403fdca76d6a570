"""The tables every reader fills, whatever the files look like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

# Given all interactions in file order, the rows to keep. Readers call it before they read item
# metadata, so that they can pass over the items nobody needs.
Select = Callable[[pl.DataFrame], pl.DataFrame]


@dataclass(frozen=True)
class RawData:
    """A data set as three tables keyed by raw ids.

    `interactions`: user and item (str), time (int64, seconds or whatever the files count in),
    rating (float32, null: none), in file order.
    `items`: item, title (null: unknown), and one column of list[str] for each attribute.
    `users`: user, and one column of str for each attribute of the user's profile.
    Items and users without a row, and rows nobody interacted with, are both allowed.
    """

    interactions: pl.DataFrame
    items: pl.DataFrame
    users: pl.DataFrame


def no_items() -> pl.DataFrame:
    return pl.DataFrame(schema={"item": pl.String, "title": pl.String})


def no_users() -> pl.DataFrame:
    return pl.DataFrame(schema={"user": pl.String})


def natural_title(title: pl.Expr) -> pl.Expr:
    """`Usual Suspects, The (1995)` as people and language models write it: article in front."""
    articles = "The|A|An|Le|La|Les|Il|El|Los|Las|Das|Der|Die|Det|Den"
    return title.str.replace(rf"^(.+), ({articles})( \(.*)?$", "$2 $1$3")


def out_of_bounds(interactions: pl.DataFrame, low: float, high: float) -> int | None:
    """Row of the first rating outside the bounds."""
    outside = ~pl.col("rating").is_between(low, high)
    return interactions.select(outside.arg_true().first()).item()
