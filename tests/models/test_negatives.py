"""Negatives drawn anew: where, from what, how often."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_lists import random_lists

from dpo4rec_jax.models.cuts import interactions
from dpo4rec_jax.models.lists import Lists
from dpo4rec_jax.models.negatives import redrawn, unmet_of

USERS, ITEMS, LENGTH = 40, 30, 8


@pytest.fixture(scope="module")
def world():
    """Users who met 9 to 26 of 30 items, one of them twice; the lists of every fourth stay."""
    lists, met, user_E, item_E = random_lists(USERS, ITEMS, LENGTH, 2, 3, fewest=9, most=26)
    doubled = np.append(user_E, 0), np.append(item_E, item_E[0])
    event_LN = interactions(*doubled, ITEMS, lists)
    redrawn_L = np.asarray(lists.user_L) % 4 != 0
    choice = unmet_of(*doubled, ITEMS, lists, event_LN, redrawn_L, seed=0)
    return lists, [set(items) for items in met], choice


def draw(world, seed: int, epoch: int = 0) -> Lists:
    lists, _, unmet = world
    return redrawn(lists, unmet.replace(seed=jnp.uint32(seed)), ITEMS, jnp.int32(epoch))


def rows(lists: Lists):
    arrays = (lists.user_L, lists.item_LN, lists.label_LN, lists.mask_LN)
    return zip(*map(np.asarray, arrays), strict=True)


def test_what_the_user_met_stays_with_its_label_and_the_rest_is_distinct_and_unmet(world):
    lists, met, _ = world
    moved = 0
    for (user, item, label, mask), (_, now, label_now, _) in zip(
        rows(lists), rows(draw(world, 1)), strict=True
    ):
        own = {(i, y) for i, y in zip(item[mask], label[mask], strict=True) if i in met[user]}
        pairs = list(zip(now[mask], label_now[mask], strict=True))
        assert own == {(i, y) for i, y in pairs if i in met[user]}
        assert all(y == 0 for i, y in pairs if i not in met[user])
        assert len(set(now[mask])) == mask.sum()
        np.testing.assert_array_equal(now[~mask], item[~mask])
        moved += set(now[mask]) != set(item[mask])
    assert moved > len(lists.user_L) / 2


def test_lists_that_are_not_redrawn_stay_as_they_are(world):
    lists, _, unmet = world
    kept = ~np.asarray(unmet.redrawn_L)
    for a, b in zip(rows(lists), rows(draw(world, 1)), strict=True):
        if a[0] % 4 == 0:
            np.testing.assert_array_equal(a[1], b[1])
            np.testing.assert_array_equal(a[2], b[2])
    assert kept.any()


def test_every_unmet_item_and_every_place_is_equally_likely(world):
    lists, met, unmet = world
    row = int(np.flatnonzero(np.asarray(unmet.redrawn_L) & np.asarray(lists.mask_LN).all(1))[0])
    user, draws = int(lists.user_L[row]), 2000
    one = jax.tree.map(lambda x: x[row : row + 1], (lists.user_L, lists.item_LN, lists.label_LN))
    alone = Lists(*one, lists.mask_LN[row : row + 1], lists.attribute_IAM)
    choice = unmet.replace(
        sampled_LN=unmet.sampled_LN[row : row + 1], redrawn_L=unmet.redrawn_L[row : row + 1]
    )
    many = jax.vmap(lambda epoch: redrawn(alone, choice, ITEMS, epoch).item_LN[0])
    item_DN = np.asarray(many(jnp.arange(draws)))
    sampled = int(choice.sampled_LN.sum())
    free = [i for i in range(ITEMS) if i not in met[user]]
    expected = draws * sampled / len(free)
    count = np.array([(item_DN == i).sum() for i in free])
    # A count's variance is that of draws without replacement; five of its deviations.
    deviation = np.sqrt(expected * (1 - sampled / len(free)))
    assert np.abs(count - expected).max() < 5 * deviation
    own = next(iter(met[user] & set(np.asarray(lists.item_LN)[row].tolist())))
    place_N = (item_DN == own).mean(0)
    assert np.abs(place_N - 1 / LENGTH).max() < 5 * np.sqrt(1 / LENGTH / draws)


def test_draws_depend_on_seed_and_epoch_alone(world):
    first = np.asarray(draw(world, 1, epoch=2).item_LN)
    np.testing.assert_array_equal(first, draw(world, 1, epoch=2).item_LN)
    assert (first != np.asarray(draw(world, 1, epoch=3).item_LN)).any()
    assert (first != np.asarray(draw(world, 2, epoch=2).item_LN)).any()
