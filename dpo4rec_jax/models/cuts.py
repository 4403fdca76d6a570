"""Lists cut elsewhere: the same interactions in the same order, in other company, for every epoch.

Where a sequence is cut into lists is an accident. Each user's interactions are turned by a random
number of places (those at the end come to the beginning) and fill his lists again: neighbours stay
neighbours, but for the two ends, and every cut between them comes up.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Bool, Int

from dpo4rec_jax.models.lists import Lists


@struct.dataclass
class Met:
    """The P interactions that lists hold, by user and in time order, and their labels.

    `place_LN`: which of them a place shows, -1 where it shows none. User u's are
    `[offset_U1[u], offset_U1[u + 1])`. `seed` is of all draws.
    """

    user_P: jax.Array
    item_P: jax.Array
    label_P: jax.Array
    place_LN: jax.Array
    offset_U1: jax.Array
    seed: jax.Array

    @property
    def most(self) -> int:
        """Interactions of one list, at the most."""
        return int((np.asarray(self.place_LN) >= 0).sum(1).max(initial=0))


def interactions(
    user_E: Int[np.ndarray, " E"], item_E: Int[np.ndarray, " E"], num_items: int, lists: Lists
) -> Int[np.ndarray, "L N"]:
    """Which interaction of its user each candidate is, -1 for sampled ones and padding."""
    key_E = user_E.astype(np.int64) * num_items + item_E
    order_E = np.argsort(key_E, kind="stable")
    key_LN = np.asarray(lists.user_L)[:, None].astype(np.int64) * num_items
    key_LN = key_LN + np.asarray(lists.item_LN)
    at_LN = np.searchsorted(key_E, key_LN, sorter=order_E)
    event_LN = np.take(order_E, at_LN, mode="clip")
    return np.where((key_E[event_LN] == key_LN) & np.asarray(lists.mask_LN), event_LN, -1)


def met_of(
    event_LN: Int[np.ndarray, "L N"], lists: Lists, cut_L: Bool[np.ndarray, " L"], seed: int
) -> Met:
    """Of the lists that `cut_L` picks, all of a user's or none; the others are left as they are.
    `event_LN` as from `interactions`, of interactions sorted by user and time."""
    list_P, at_P = np.nonzero((event_LN >= 0) & cut_L[:, None])
    order_P = np.argsort(event_LN[list_P, at_P], kind="stable")
    list_P, at_P = list_P[order_P], at_P[order_P]
    user_L = np.asarray(lists.user_L)
    user_P = user_L[list_P]
    place_LN = np.full(event_LN.shape, -1, np.int32)
    place_LN[list_P, at_P] = np.arange(len(list_P), dtype=np.int32)
    users = np.arange(int(user_L.max()) + 2)
    return Met(
        user_P=jnp.asarray(user_P),
        item_P=lists.item_LN[list_P, at_P],
        label_P=lists.label_LN[list_P, at_P],
        place_LN=jnp.asarray(place_LN),
        offset_U1=jnp.asarray(np.searchsorted(user_P, users).astype(np.int32)),
        seed=jnp.uint32(seed),
    )


@jax.jit
def cut_anew(lists: Lists, met: Met, epoch: ArrayLike) -> Lists:
    """The lists with each user's interactions turned by a number of places of the epoch's own.
    Labels move with their items; lists stay as long as they are."""
    first_U, count_U = met.offset_U1[:-1], jnp.diff(met.offset_U1)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(met.seed), epoch), 1)
    turn_U = jax.random.randint(key, count_U.shape, 0, jnp.maximum(count_U, 1))
    first_L1, count_L1, turn_L1 = (x[lists.user_L][:, None] for x in (first_U, count_U, turn_U))
    turned_LN = (met.place_LN - first_L1 + turn_L1) % jnp.maximum(count_L1, 1) + first_L1
    shown_LN = met.place_LN >= 0
    return replace(
        lists,
        item_LN=jnp.where(shown_LN, met.item_P[turned_LN], lists.item_LN),
        label_LN=jnp.where(shown_LN, met.label_P[turned_LN], lists.label_LN),
    )
