"""Candidate lists and the split by user: KAR's protocol (Xi et al. 2023) without its leaks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Int8, Int32

from dpo4rec_jax.config import InputError

# Lists in which random draws still clash after so many rounds are filled from the full choice.
DRAWING_ROUNDS = 24


@dataclass(frozen=True)
class Lists:
    user_L: Int32[np.ndarray, " L"]
    item_LN: Int32[np.ndarray, "L N"]
    label_LN: Int8[np.ndarray, "L N"]
    mask_LN: Bool[np.ndarray, "L N"]


def build_lists(
    user_E: Int[np.ndarray, " E"],
    item_E: Int[np.ndarray, " E"],
    rating_E: Float[np.ndarray, " E"],
    window_U: Int[np.ndarray, " U"],
    *,
    num_items: int,
    list_length: int,
    per_list: int,
    threshold: float,
    rng: np.random.Generator,
) -> Lists:
    """Cuts what follows each user's window into candidate lists.

    Interactions come sorted by user and time. Consecutive chunks of `per_list` are each joined by
    items drawn without replacement from those the user never interacted with (KAR draws from all
    items, so that its negatives may be the user's own), up to `list_length`, and shuffled. A
    user's last chunk may be shorter; as in KAR it becomes a list all the same, with more sampled
    items. Label 1: rated above `threshold`, or not rated at all (NaN); sampled items get 0.
    Where a user left too few items untouched, the places that remain are masked.

    Raises InputError where no user has an item after the window.
    """
    length_U = np.bincount(user_E, minlength=len(window_U))
    after_U = length_U - window_U
    if after_U.max(initial=0) <= 0:
        raise InputError("no user has an item after the knowledge window; lower data.window")
    lists_U = -(-after_U // per_list)
    user_L = np.repeat(np.arange(len(window_U)), lists_U)
    chunk_L = np.arange(len(user_L)) - np.repeat(np.cumsum(lists_U) - lists_U, lists_U)
    own_L = np.minimum(per_list, after_U[user_L] - chunk_L * per_list)

    start_U = np.cumsum(length_U) - length_U
    event_L = start_U[user_L] + window_U[user_L] + chunk_L * per_list
    place_N = np.arange(list_length)
    own_LN = place_N < own_L[:, None]
    event_LN = np.where(own_LN, event_L[:, None] + place_N, 0)

    free_L = num_items - length_U[user_L]
    mask_LN = place_N < (own_L + np.minimum(list_length - own_L, free_L))[:, None]
    key_E = np.sort(user_E.astype(np.int64) * num_items + item_E)
    drawn_LN = draw_unseen(user_L, mask_LN & ~own_LN, key_E, num_items, rng)
    item_LN = np.where(own_LN, item_E[event_LN], drawn_LN)
    label_LN = own_LN & ~(rating_E[event_LN] <= threshold)

    shuffle_LN = np.argsort(np.where(mask_LN, rng.random(mask_LN.shape), 2.0), axis=1)
    item_LN, label_LN, mask_LN = (
        np.take_along_axis(values, shuffle_LN, axis=1) for values in (item_LN, label_LN, mask_LN)
    )
    return Lists(
        user_L=user_L.astype(np.int32),
        item_LN=np.where(mask_LN, item_LN, 0).astype(np.int32),
        label_LN=(label_LN & mask_LN).astype(np.int8),
        mask_LN=mask_LN,
    )


def draw_unseen(
    user_L: Int[np.ndarray, " L"],
    wanted_LN: Bool[np.ndarray, "L N"],
    key_E: Int[np.ndarray, " E"],
    num_items: int,
    rng: np.random.Generator,
) -> Int[np.ndarray, "L N"]:
    """Items for the wanted places, uniform without replacement over the user's unseen items.

    `key_E` holds the seen pairs as sorted `user * num_items + item`. All places are drawn at once
    and those that clash drawn again, which keeps every set of unseen items equally likely.
    """
    num_lists, length = wanted_LN.shape
    item_LN = np.full((num_lists, length), -1)
    todo_LN = wanted_LN.copy()
    for _ in range(DRAWING_ROUNDS):
        list_D, place_D = np.nonzero(todo_LN)
        if not len(list_D):
            return item_LN
        item_LN[list_D, place_D] = item_D = rng.integers(num_items, size=len(list_D))
        seen_D = _contains(key_E, user_L[list_D] * np.int64(num_items) + item_D)
        todo_LN[list_D, place_D] = seen_D
        touched_L = list_D[np.flatnonzero(np.diff(list_D, prepend=-1))]
        repeated = _repeats(np.where(wanted_LN[touched_L], item_LN[touched_L], -1))
        todo_LN[touched_L] |= repeated & wanted_LN[touched_L]
    for row in np.unique(np.nonzero(todo_LN)[0]):
        start, end = np.searchsorted(key_E, user_L[row] * num_items + np.array([0, num_items]))
        unseen = np.setdiff1d(np.arange(num_items), key_E[start:end] % num_items)
        wanted_N = wanted_LN[row]
        item_LN[row, wanted_N] = rng.choice(unseen, size=wanted_N.sum(), replace=False)
    return item_LN


def split_users(
    num_users: int, validation: float, test: float, rng: np.random.Generator
) -> Int8[np.ndarray, " U"]:
    """0 train, 1 validation, 2 test; at least one user each.

    Raises InputError where there are fewer than three users or no share is left to train on.
    """
    num_validation = max(1, round(num_users * validation))
    num_test = max(1, round(num_users * test))
    if num_users - num_validation - num_test < 1:
        raise InputError(
            f"expected users to train on, got {num_users} users of which data.validation_fraction "
            f"and data.test_fraction take {num_validation + num_test}; give more users or lower "
            "the fractions"
        )
    split_U = np.zeros(num_users, dtype=np.int8)
    order_U = rng.permutation(num_users)
    split_U[order_U[:num_validation]] = 1
    split_U[order_U[num_validation : num_validation + num_test]] = 2
    return split_U


def _contains(sorted_keys: np.ndarray, keys: np.ndarray) -> np.ndarray:
    place = np.searchsorted(sorted_keys, keys)
    return np.take(sorted_keys, place, mode="clip") == keys


def _repeats(item_LN: np.ndarray) -> np.ndarray:
    """True at each second and later occurrence of an item (-1 apart) in a row."""
    order_LN = np.argsort(item_LN, axis=1, kind="stable")
    sorted_LN = np.take_along_axis(item_LN, order_LN, axis=1)
    repeat_LN = np.zeros(item_LN.shape, dtype=bool)
    repeat_LN[:, 1:] = (sorted_LN[:, 1:] == sorted_LN[:, :-1]) & (sorted_LN[:, 1:] >= 0)
    back_LN = np.zeros_like(repeat_LN)
    np.put_along_axis(back_LN, order_LN, repeat_LN, axis=1)
    return back_LN
