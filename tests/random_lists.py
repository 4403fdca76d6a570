"""Users who met random items, and the lists cut from what they met."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dpo4rec_jax.data.lists import build_lists
from dpo4rec_jax.models.lists import Lists


class RandomLists(NamedTuple):
    """`met`: each user's items in time order; `user_E` and `item_E` hold the same, flat."""

    lists: Lists
    met: list[np.ndarray]
    user_E: np.ndarray
    item_E: np.ndarray


def random_lists(
    users: int, items: int, length: int, window: int, per_list: int, fewest: int, most: int
) -> RandomLists:
    """Every user met `fewest` to `most` of the items."""
    random = np.random.default_rng(0)
    met = [random.permutation(items)[: random.integers(fewest, most + 1)] for _ in range(users)]
    user_E = np.repeat(np.arange(users), [len(own) for own in met])
    item_E = np.concatenate(met)
    built = build_lists(
        user_E,
        item_E,
        random.integers(1, 6, len(item_E)).astype(np.float32),
        np.full(users, window),
        num_items=items,
        list_length=length,
        per_list=per_list,
        threshold=3.0,
        rng=random,
    )
    arrays = {name: jnp.asarray(value) for name, value in vars(built).items()}
    lists = Lists(**arrays, attribute_IAM=jnp.zeros((items, 1, 1), jnp.int32))
    return RandomLists(lists, met, user_E, item_E)
