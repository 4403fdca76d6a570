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
    user_E, item_E = _codes(interactions["user"])[0], _codes(interactions["item"])[0]
    keep_E = first_of_pairs(user_E, item_E, interactions["time"].to_numpy())
    if min_user or min_item:
        keep_E[keep_E] = k_core(user_E[keep_E], item_E[keep_E], min_user or 1, min_item or 1)
        if not keep_E.any():
            raise InputError(
                f"data.min_user_interactions {min_user or 1}, data.min_item_interactions "
                f"{min_item or 1}: no user and item of {interactions.height:,} interactions reach "
                "them; lower them"
            )
    length_U = np.bincount(user_E[keep_E], minlength=user_E.max() + 1)
    suited_U = length_U > 1
    if not suited_U.any():
        raise InputError(
            "no user has an item after the knowledge window: every user has one interaction; "
            "candidate lists need users with two or more"
        )
    if max_users is not None:
        suited_U &= np.cumsum(suited_U) <= max_users
    return interactions.filter(keep_E & suited_U[user_E])


def index(interactions: pl.DataFrame, resolution: int = 1) -> Indexed:
    """Numbers users and items in order of first appearance and sorts by time.

    Times within the same `resolution` seconds are ties, kept in file order; times too large to be
    seconds since 1970 are milliseconds (as in Amazon 2023), or micro- or nanoseconds.
    """
    user_E, user_id = _codes(interactions["user"])
    item_E, item_id = _codes(interactions["item"])
    time_E = interactions["time"].to_numpy()
    rating_E = interactions["rating"].fill_null(float("nan")).to_numpy()
    order_E = np.lexsort((time_E // (resolution * _ticks(time_E)), user_E))
    return Indexed(
        user_id=user_id,
        item_id=item_id,
        user_E=user_E[order_E],
        item_E=item_E[order_E],
        time_E=time_E[order_E].astype(np.int64),
        rating_E=rating_E[order_E].astype(np.float32),
    )


def _ticks(time_E: np.ndarray) -> int:
    """Of a second: the fewest that put the latest time before the year 5000."""
    latest = int(time_E.max(initial=0))
    return next(ticks for ticks in (1, 10**3, 10**6, 10**9) if latest < 10**11 * ticks)


def window(length_U: Int[np.ndarray, " U"], cap: int) -> Int32[np.ndarray, " U"]:
    """Size of the knowledge window: the first half of the interactions, rounded up, or the cap."""
    return np.minimum((length_U + 1) // 2, cap).astype(np.int32)


def first_of_pairs(
    user_E: Int[np.ndarray, " E"], item_E: Int[np.ndarray, " E"], time_E: Int[np.ndarray, " E"]
) -> Bool[np.ndarray, " E"]:
    """True at the earliest interaction of each (user, item) pair, ties by file order."""
    key_E = user_E * (item_E.max(initial=0) + 1) + item_E
    order_E = np.argsort(key_E, kind="stable")
    again_E = np.zeros(len(key_E), dtype=bool)
    again_E[1:] = np.diff(key_E[order_E]) == 0
    if again_E.any():
        order_E = np.lexsort((time_E, key_E))
    first_E = np.empty_like(again_E)
    first_E[order_E] = ~again_E
    return first_E


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


def _codes(ids: pl.Series) -> tuple[np.ndarray, list[str]]:
    """Indices by order of first appearance, and the ids they stand for."""
    distinct = ids.unique(maintain_order=True)
    codes = ids.cast(pl.Enum(distinct)).to_physical()
    return codes.to_numpy().astype(np.int64), distinct.to_list()
