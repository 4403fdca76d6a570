"""Lists cut elsewhere: what moves, in what order, and what stays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_lists import random_lists

from dpo4rec_jax.models.cuts import cut_anew, interactions, met_of
from dpo4rec_jax.models.lists import Lists

USERS, ITEMS, LENGTH, WINDOW, PER_LIST = 30, 60, 9, 2, 4


@pytest.fixture(scope="module")
def world():
    """The lists of every fourth user stay."""
    lists, met, user_E, item_E = random_lists(
        USERS, ITEMS, LENGTH, WINDOW, PER_LIST, fewest=3, most=40
    )
    event_LN = interactions(user_E, item_E, ITEMS, lists)
    cut_L = np.asarray(lists.user_L) % 4 != 0
    return lists, met, event_LN, cut_L, met_of(event_LN, lists, cut_L, seed=0)


def own(lists: Lists, event_LN: np.ndarray, row: int) -> list[tuple[int, int]]:
    """Items and labels of the places that show interactions."""
    at = event_LN[row] >= 0
    items, labels = (np.asarray(x_LN)[row, at] for x_LN in (lists.item_LN, lists.label_LN))
    return list(zip(items.tolist(), labels.tolist(), strict=True))


def test_interactions_are_told_from_sampled_items(world):
    lists, met, event_LN, _, _ = world
    user_E = np.repeat(np.arange(USERS), [len(items) for items in met])
    item_E = np.concatenate(met)
    for user, item_N, mask_N, event_N in zip(
        *map(np.asarray, (lists.user_L, lists.item_LN, lists.mask_LN)), event_LN, strict=True
    ):
        for item, mask, event in zip(item_N, mask_N, event_N, strict=True):
            assert (event >= 0) == (mask and item in met[user])
            assert event < 0 or (user_E[event], item_E[event]) == (user, item)
    assert (event_LN >= 0).sum() == len(user_E) - USERS * WINDOW


def test_each_users_interactions_are_turned_and_fill_the_same_places_in_order(world):
    lists, met, event_LN, cut_L, choice = world
    now = cut_anew(lists, choice, 3)
    user_L = np.asarray(lists.user_L)
    turns = set()
    for user in np.unique(user_L[cut_L]):
        rows = np.flatnonzero(user_L == user)
        before = sorted(pair for row in rows for pair in own(lists, event_LN, row))
        assert before == sorted(pair for row in rows for pair in own(now, event_LN, row))
        after = met[user][WINDOW:].tolist()
        first = {item for item, _ in own(now, event_LN, rows[0])}
        count = len(after)
        fitting = (t for t in range(count) if set((after + after)[t : t + len(first)]) == first)
        turn = next(fitting)
        turned = after[turn:] + after[:turn]
        for number, row in enumerate(rows):
            chunk = turned[number * PER_LIST : (number + 1) * PER_LIST]
            assert {item for item, _ in own(now, event_LN, row)} == set(chunk)
        turns.add(turn)
    assert len(turns) > 5


def test_sampled_items_and_lists_that_are_not_cut_stay(world):
    lists, _, event_LN, cut_L, choice = world
    now = cut_anew(lists, choice, 3)
    moved_LN = np.asarray(now.item_LN != lists.item_LN)
    assert moved_LN.any()
    assert not moved_LN[event_LN < 0].any()
    assert not moved_LN[~cut_L].any()
    np.testing.assert_array_equal(now.label_LN[~cut_L], lists.label_LN[~cut_L])


def test_turns_depend_on_seed_and_epoch_alone_and_all_come_up(world):
    lists, _, event_LN, cut_L, choice = world
    first = np.asarray(cut_anew(lists, choice, 1).item_LN)
    np.testing.assert_array_equal(first, cut_anew(lists, choice, 1).item_LN)
    assert (first != cut_anew(lists, choice, 2).item_LN).any()
    assert (first != cut_anew(lists, choice.replace(seed=jnp.uint32(1)), 1).item_LN).any()
    row, draws = int(np.flatnonzero(cut_L & (event_LN >= 0).any(1))[0]), 2000
    at = int(np.flatnonzero(event_LN[row] >= 0)[0])
    many = jax.vmap(lambda epoch: cut_anew(lists, choice, epoch).item_LN[row, at])
    shown, count = np.unique(np.asarray(many(jnp.arange(draws))), return_counts=True)
    user = int(lists.user_L[row])
    length = int((event_LN[np.asarray(lists.user_L) == user] >= 0).sum())
    assert len(shown) == length
    expected = draws / length
    assert np.abs(count - expected).max() < 5 * np.sqrt(expected)
