"""From interactions in file order to users' sequences in time order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from jaxtyping import Bool, Int, Int32

from dpo4rec_jax.config import InputError


@dataclass(frozen=True)
class Indexed:
    """Interactions as indices, sorted by user, then time, ties by file order."""

    user_id: list[str]
    item_id: list[str]
    user_E: np.ndarray
    item_E: np.ndarray
    time_E: np.ndarray
    rating_E: np.ndarray

    @property
    def length_U(self) -> Int[np.ndarray, " U"]:
        return np.bincount(self.user_E, minlength=len(self.user_id))


def select(
    interactions: pl.DataFrame,
    *,
    min_user: int | None = None,
    min_item: int | None = None,
    max_users: int | None = None,
) -> pl.DataFrame:
    """The interactions to work with, in file order.

    A repeated (user, item) pair keeps its earliest interaction: a later one would be an item of
    the window among the candidates. Then the k-core; then the first `max_users` users in file
    order, and with them only the items that they interacted with. Users whom the window leaves no
    item (those with a single interaction) go too: they have no list to be trained or tested on.

    Raises InputError where nothing is left.
    """
    if interactions.is_empty():
        raise InputError("expected interactions, got none; check data.path")
    kept = _first_of_pairs(interactions)
    if min_user or min_item:
        user_E, item_E = _codes(kept["user"])[0], _codes(kept["item"])[0]
        kept = kept.filter(k_core(user_E, item_E, min_user or 1, min_item or 1))
        if kept.is_empty():
            raise InputError(
                f"data.min_user_interactions {min_user or 1}, data.min_item_interactions "
                f"{min_item or 1}: no user and item of {interactions.height:,} interactions reach "
                "them; lower them"
            )
    kept = kept.filter(pl.len().over("user") > 1)
    if kept.is_empty():
        raise InputError(
            "no user has an item after the knowledge window: every user has one interaction; "
            "candidate lists need users with two or more"
        )
    if max_users is not None:
        kept = kept.filter(pl.col("user").is_in(_distinct(kept["user"]).head(max_users).implode()))
    return kept


def index(interactions: pl.DataFrame) -> Indexed:
    """Numbers users and items in order of first appearance and sorts by time."""
    user_E, user_id = _codes(interactions["user"])
    item_E, item_id = _codes(interactions["item"])
    time_E = interactions["time"].to_numpy()
    rating_E = interactions["rating"].fill_null(float("nan")).to_numpy()
    order_E = np.lexsort((time_E, user_E))
    return Indexed(
        user_id=user_id,
        item_id=item_id,
        user_E=user_E[order_E],
        item_E=item_E[order_E],
        time_E=time_E[order_E].astype(np.int64),
        rating_E=rating_E[order_E].astype(np.float32),
    )


def window(length_U: Int[np.ndarray, " U"], cap: int) -> Int32[np.ndarray, " U"]:
    """Size of the knowledge window: the first half of the interactions, rounded up, or the cap."""
    return np.minimum((length_U + 1) // 2, cap).astype(np.int32)


def k_core(
    user_E: Int[np.ndarray, " E"], item_E: Int[np.ndarray, " E"], min_user: int, min_item: int
) -> Bool[np.ndarray, " E"]:
    """The largest part in which every user and every item keeps its least count of interactions."""
    num_users, num_items = user_E.max(initial=-1) + 1, item_E.max(initial=-1) + 1
    keep_E = np.ones(len(user_E), dtype=bool)
    while True:
        of_user_U = np.bincount(user_E[keep_E], minlength=num_users)
        of_item_I = np.bincount(item_E[keep_E], minlength=num_items)
        left_E = keep_E & (of_user_U >= min_user)[user_E] & (of_item_I >= min_item)[item_E]
        if left_E.sum() == keep_E.sum():
            return left_E
        keep_E = left_E


def _first_of_pairs(interactions: pl.DataFrame) -> pl.DataFrame:
    pairs = interactions.select("user", "item")
    if not pairs.is_duplicated().any():
        return interactions
    row = "row of file"
    earliest = interactions.with_row_index(row).sort("time", maintain_order=True)
    kept = earliest.unique(["user", "item"], keep="first", maintain_order=True)
    return kept.sort(row).drop(row)


def _distinct(ids: pl.Series) -> pl.Series:
    return ids.unique(maintain_order=True)


def _codes(ids: pl.Series) -> tuple[np.ndarray, list[str]]:
    """Indices by order of first appearance, and the ids they stand for."""
    distinct = _distinct(ids)
    codes = ids.cast(pl.Enum(distinct)).to_physical()
    return codes.to_numpy().astype(np.int64), distinct.to_list()
