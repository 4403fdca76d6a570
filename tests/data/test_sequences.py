from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo4rec_jax.config import InputError
from dpo4rec_jax.data.sequences import index, k_core, select, window


def table(*rows: tuple[str, str, int, float | None]) -> pl.DataFrame:
    schema = {"user": pl.String, "item": pl.String, "time": pl.Int64, "rating": pl.Float32}
    return pl.DataFrame(rows, schema=schema, orient="row")


def test_window_is_half_rounded_up_below_the_cap() -> None:
    lengths = np.array([2, 3, 4, 5, 59, 60, 61, 300])
    assert window(lengths, 30).tolist() == [1, 2, 2, 3, 30, 30, 30, 30]
    assert window(lengths, 15).tolist() == [1, 2, 2, 3, 15, 15, 15, 15]


def test_sequences_are_in_time_order_and_ties_in_file_order() -> None:
    rows = [
        ("b", "x", 5, 1),
        ("a", "x", 9, 2),
        ("b", "z", 3, 3),
        ("b", "y", 5, 4),
        ("a", "y", 1, 5),
    ]
    indexed = index(table(*rows))
    assert indexed.user_id == ["b", "a"]
    assert indexed.item_id == ["x", "z", "y"]
    assert indexed.user_E.tolist() == [0, 0, 0, 1, 1]
    assert indexed.rating_E.tolist() == [3, 1, 4, 5, 2]
    assert indexed.length_U.tolist() == [3, 2]


def test_missing_ratings_become_nan() -> None:
    indexed = index(table(("a", "x", 1, None), ("a", "y", 2, 4.0)))
    assert np.isnan(indexed.rating_E).tolist() == [True, False]


def test_a_repeated_pair_keeps_its_earliest_interaction() -> None:
    rows = [
        ("a", "x", 7, 1),
        ("a", "y", 5, 2),
        ("a", "x", 3, 3),
        ("a", "z", 4, 4),
        ("a", "x", 3, 5),
    ]
    assert select(table(*rows))["rating"].to_list() == [2, 3, 4]


def test_users_with_a_single_interaction_are_left_out() -> None:
    rows = [("a", "x", 1, 1), ("b", "x", 1, 2), ("b", "y", 2, 3)]
    assert select(table(*rows))["user"].to_list() == ["b", "b"]


def test_max_users_takes_the_first_in_file_order_with_enough_interactions() -> None:
    rows = [
        (u, i, 1, 1)
        for u, items in (("c", "xy"), ("d", "x"), ("b", "xyz"), ("a", "yz"))
        for i in items
    ]
    kept = select(table(*rows), max_users=2)
    assert kept["user"].unique(maintain_order=True).to_list() == ["c", "b"]
    assert kept.height == 5


def test_k_core_shrinks_until_every_bound_holds() -> None:
    # Item z has two users until user c, with two items only, is gone.
    rows = [(u, i, 1, 1) for u, items in (("a", "wxy"), ("b", "wxyz"), ("c", "zw")) for i in items]
    kept = select(table(*rows), min_user=3, min_item=2)
    assert set(kept["user"]) == {"a", "b"}
    assert set(kept["item"]) == {"w", "x", "y"}


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.sets(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1),
    min_user=st.integers(1, 4),
    min_item=st.integers(1, 4),
)
def test_k_core_is_the_largest_set_within_the_bounds(pairs, min_user, min_item) -> None:
    listed = sorted(pairs)
    user_E, item_E = np.array(listed).T
    keep_E = k_core(user_E, item_E, min_user, min_item)
    expected = set(listed)  # drop one offender at a time: the order does not matter to the end
    while True:
        users, items = zip(*expected, strict=True) if expected else ((), ())
        poor = {
            (u, i) for u, i in expected if users.count(u) < min_user or items.count(i) < min_item
        }
        if not poor:
            break
        expected.remove(min(poor))
    assert {pair for pair, keep in zip(listed, keep_E, strict=True) if keep} == expected


def test_what_leaves_nothing_is_an_input_error() -> None:
    single = table(("a", "x", 1, 5), ("b", "y", 1, 5))
    with pytest.raises(InputError, match="every user has one interaction"):
        select(single)
    with pytest.raises(InputError, match=r"data\.min_user_interactions 9"):
        select(single, min_user=9)
    with pytest.raises(InputError, match="expected interactions, got none"):
        select(table())


def test_by_day_interactions_of_one_day_keep_the_order_of_the_file() -> None:
    day = 24 * 60 * 60
    rows = [("u", "a", day + 9, 1.0), ("u", "b", day + 5, 2.0), ("u", "c", 3, 3.0)]
    interactions = table(*rows, ("u", "d", day + 7, 4.0))
    assert index(interactions).rating_E.tolist() == [3.0, 2.0, 4.0, 1.0]
    assert index(interactions, resolution=day).rating_E.tolist() == [3.0, 1.0, 2.0, 4.0]


@pytest.mark.parametrize("ticks", [1, 1000, 10**6])
def test_a_day_is_a_day_whatever_the_unit_of_time(ticks: int) -> None:
    day = 24 * 60 * 60
    morning = 15_000 * day  # in 2011
    rows = [("u", "a", morning + 9, 1.0), ("u", "b", morning + 5, 2.0), ("u", "c", 3, 3.0)]
    interactions = table(*((user, item, time * ticks, stars) for user, item, time, stars in rows))
    assert index(interactions, resolution=day).rating_E.tolist() == [3.0, 1.0, 2.0]
    assert index(interactions).rating_E.tolist() == [3.0, 2.0, 1.0]
