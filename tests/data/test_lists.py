from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo4rec_jax.config import InputError
from dpo4rec_jax.data.lists import build_lists, draw_unseen, split_users
from dpo4rec_jax.data.sequences import window


def lists_of(lengths, num_items, *, cap=30, list_length=10, per_list=4, threshold=3.0, seed=0):
    """Lists of users who each met `length` items, in a random order, with ratings 1 to 5."""
    rng = np.random.default_rng(seed)
    user_E = np.repeat(np.arange(len(lengths)), lengths)
    item_E = np.concatenate([rng.permutation(num_items)[:length] for length in lengths])
    rating_E = rng.integers(1, 6, size=len(user_E)).astype(np.float32)
    window_U = window(np.array(lengths), cap)
    lists = build_lists(
        user_E,
        item_E,
        rating_E,
        window_U,
        num_items=num_items,
        list_length=list_length,
        per_list=per_list,
        threshold=threshold,
        rng=rng,
    )
    return user_E, item_E, rating_E, window_U, lists


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=8),
    spare=st.integers(0, 40),
    cap=st.integers(1, 20),
    per_list=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_lists_hold_what_follows_the_window_once_and_unseen_items(
    lengths, spare, cap, per_list, seed
) -> None:
    num_items = 30 + spare
    _, item_E, rating_E, window_U, lists = lists_of(
        lengths, num_items, cap=cap, per_list=per_list, seed=seed
    )
    start = 0
    for user, length in enumerate(lengths):
        met = item_E[start : start + length].tolist()
        stars = dict(zip(met, rating_E[start : start + length].tolist(), strict=True))
        start += length
        before, after = met[: window_U[user]], met[window_U[user] :]
        rows = np.nonzero(lists.user_L == user)[0]
        assert len(rows) == -(-len(after) // per_list)
        for place, row in enumerate(rows):
            chunk = after[place * per_list : (place + 1) * per_list]
            real = lists.mask_LN[row]
            items = lists.item_LN[row][real].tolist()
            labels = dict(zip(items, lists.label_LN[row][real].tolist(), strict=True))
            assert len(set(items)) == len(items)
            assert set(chunk) <= set(items)
            assert not set(items) & set(before)
            assert not (set(items) - set(chunk)) & set(met)
            assert {item for item, label in labels.items() if label} == {
                item for item in chunk if stars[item] > 3
            }
            unseen = num_items - length
            assert len(items) == len(chunk) + min(10 - len(chunk), unseen)
            assert not lists.item_LN[row][~real].any()
            assert not lists.label_LN[row][~real].any()


def test_interactions_without_ratings_are_positive() -> None:
    lists = build_lists(
        np.zeros(6, np.int64),
        np.arange(6),
        np.full(6, np.nan, np.float32),
        np.array([2]),
        num_items=20,
        list_length=10,
        per_list=4,
        threshold=3.0,
        rng=np.random.default_rng(0),
    )
    assert lists.label_LN.sum() == 4
    assert set(lists.item_LN[lists.label_LN == 1]) == {2, 3, 4, 5}


def test_positives_stand_anywhere_in_a_list() -> None:
    *_, lists = lists_of([60] * 40, 200, threshold=0.0)
    share_N = lists.label_LN.mean(axis=0)
    # 320 lists, 4 of 10 places positive: six standard deviations are 0.16.
    assert np.all(np.abs(share_N - share_N.mean()) < 0.16)


def test_sampled_items_are_uniform_over_the_unseen() -> None:
    rounds, num_items = 4000, 6
    key_E = np.array([1])  # the one user met item 1
    drawn = draw_unseen(
        np.zeros(rounds, np.int64),
        np.ones((rounds, 2), bool),
        key_E,
        num_items,
        np.random.default_rng(0),
    )
    pairs = {frozenset(row) for row in drawn.tolist()}
    count = {pair: sum(frozenset(row) == pair for row in drawn.tolist()) for pair in pairs}
    assert len(count) == 10  # 5 unseen items over 2
    # Expected 400 of each; the standard deviation is 19.
    assert all(abs(number - 400) < 5 * 19 for number in count.values())


def test_all_unseen_items_are_found_where_only_just_enough_remain() -> None:
    key_E = np.arange(3, 3000)
    drawn = draw_unseen(
        np.zeros(5, np.int64), np.ones((5, 3), bool), key_E, 3000, np.random.default_rng(0)
    )
    assert [sorted(row) for row in drawn.tolist()] == [[0, 1, 2]] * 5


def test_split_takes_tenths_of_the_users_and_depends_on_the_seed() -> None:
    split_U = split_users(1000, 0.1, 0.1, np.random.default_rng(3))
    assert np.bincount(split_U).tolist() == [800, 100, 100]
    again_U = split_users(1000, 0.1, 0.1, np.random.default_rng(3))
    other_U = split_users(1000, 0.1, 0.1, np.random.default_rng(4))
    assert (split_U == again_U).all()
    assert (split_U != other_U).any()


def test_three_users_make_one_of_each_split_and_two_are_too_few() -> None:
    assert sorted(split_users(3, 0.1, 0.1, np.random.default_rng(0))) == [0, 1, 2]
    with pytest.raises(InputError, match="expected users to train on, got 2 users"):
        split_users(2, 0.1, 0.1, np.random.default_rng(0))


def test_no_item_after_any_window_is_an_input_error() -> None:
    with pytest.raises(InputError, match="no user has an item after the knowledge window"):
        build_lists(
            np.array([0, 1]),
            np.array([0, 1]),
            np.array([5.0, 5.0], np.float32),
            np.array([1, 1]),
            num_items=9,
            list_length=5,
            per_list=2,
            threshold=3.0,
            rng=np.random.default_rng(0),
        )
