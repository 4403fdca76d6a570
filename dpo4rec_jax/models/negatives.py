"""Sampled candidates drawn anew: the same interactions among other items, for every epoch.

A list's sampled items are a draw from all those that its user never met. Trained on one draw, a
re-ranker learns it by heart within few epochs; trained on a new one each epoch it learns which
items are met at all.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Bool, Int

from dpo4rec_jax.models.lists import Lists


@struct.dataclass
class Unmet:
    """What may be drawn, and where: `met_E[offset_U1[u]:offset_U1[u + 1]]` are the distinct items
    that user u met, ascending; `sampled_LN` the places of drawn items in the lists of `redrawn_L`,
    the others are left as they are. `seed` is of all draws. No user met more than `most` items."""

    met_E: jax.Array
    offset_U1: jax.Array
    sampled_LN: jax.Array
    redrawn_L: jax.Array
    seed: jax.Array
    most: int = struct.field(pytree_node=False)


def unmet_of(
    user_E: Int[np.ndarray, " E"],
    item_E: Int[np.ndarray, " E"],
    num_items: int,
    lists: Lists,
    event_LN: Int[np.ndarray, "L N"],
    redrawn_L: Bool[np.ndarray, " L"],
    seed: int,
) -> Unmet:
    """From all interactions, in any order; a candidate that is none of them (`cuts.interactions`)
    was drawn."""
    key_E = np.unique(user_E.astype(np.int64) * num_items + item_E)
    users = int(user_E.max()) + 1
    offset_U1 = np.searchsorted(key_E, np.arange(users + 1) * np.int64(num_items))
    return Unmet(
        met_E=jnp.asarray((key_E % num_items).astype(np.int32)),
        offset_U1=jnp.asarray(offset_U1.astype(np.int32)),
        sampled_LN=jnp.asarray(np.asarray(lists.mask_LN) & (event_LN < 0) & redrawn_L[:, None]),
        redrawn_L=jnp.asarray(redrawn_L),
        seed=jnp.uint32(seed),
        most=int(np.diff(offset_U1).max()),
    )


def redrawn(lists: Lists, unmet: Unmet, num_items: int, epoch: ArrayLike) -> Lists:
    """The lists with new items in the sampled places, uniform without replacement over what the
    user never met, and shuffled. Labels move with their items."""
    item_LN, label_LN = _redrawn(lists, unmet, num_items, epoch)
    return replace(lists, item_LN=item_LN, label_LN=label_LN)


@partial(jax.jit, static_argnums=2)
def _redrawn(
    lists: Lists, unmet: Unmet, num_items: int, epoch: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    draw_key, order_key = jax.random.split(jax.random.fold_in(jax.random.key(unmet.seed), epoch))
    start_L, stop_L = (unmet.offset_U1[lists.user_L + i] for i in (0, 1))
    rank_LN = _ranks(num_items - (stop_L - start_L), unmet.sampled_LN, draw_key)
    drawn_LN = _unmet_item(unmet.met_E, start_L, stop_L, rank_LN, unmet.most)
    item_LN = jnp.where(unmet.sampled_LN, drawn_LN, lists.item_LN)
    place_LN = _shuffled_places(lists.mask_LN, unmet.redrawn_L, order_key)
    moved = partial(jnp.take_along_axis, indices=place_LN, axis=1)
    return moved(item_LN), moved(lists.label_LN)


def _shuffled_places(
    mask_LN: Bool[jax.Array, "L N"], shuffled_L: Bool[jax.Array, " L"], key: jax.Array
) -> Int[jax.Array, "L N"]:
    """The places of a list in random order, but for padding, which stays last.

    Random numbers carry their place in their last bits: arrays sorted by themselves take a sixth of
    the time of one that moves others on a CPU."""
    length = mask_LN.shape[1]
    bits = (length - 1).bit_length()
    place_N = jnp.arange(length, dtype=jnp.uint32)
    chance_LN = jnp.where(mask_LN, jax.random.bits(key, mask_LN.shape), jnp.uint32(2**32 - 1))
    by_LN = jnp.where(shuffled_L[:, None], chance_LN << bits, 0) | place_N[None]
    return (jnp.sort(by_LN, axis=1) & (2**bits - 1)).astype(jnp.int32)


def _ranks(
    choice_L: Int[jax.Array, " L"], sampled_LN: Bool[jax.Array, "L N"], key: jax.Array
) -> Int[jax.Array, "L N"]:
    """For the sampled places distinct numbers in [0, choice), every ordered choice equally likely.

    Each is drawn among those left and moved past the ones before it, which are kept ascending.
    """
    num_lists, length = sampled_LN.shape
    place_N1 = jnp.arange(length)[:, None]

    def draw(taken, now):
        taken_NL, count_L = taken
        key, sampled_L = now
        left_L = jnp.maximum(choice_L - count_L, 1)
        rank_L = jax.random.randint(key, (num_lists,), 0, left_L, jnp.int32)
        before_L = (taken_NL - place_N1 <= rank_L[None]).sum(0)
        rank_L = rank_L + before_L
        after_NL = jnp.pad(taken_NL, ((1, 0), (0, 0)))[:length]
        at_NL = place_N1 - before_L[None]
        with_NL = jnp.where(at_NL < 0, taken_NL, jnp.where(at_NL > 0, after_NL, rank_L[None]))
        taken_NL = jnp.where(sampled_L[None], with_NL, taken_NL)
        return (taken_NL, count_L + sampled_L), rank_L

    never = jnp.iinfo(jnp.int32).max
    none_taken = jnp.full((length, num_lists), never), jnp.zeros(num_lists, jnp.int32)
    _, rank_NL = jax.lax.scan(draw, none_taken, (jax.random.split(key, length), sampled_LN.T))
    return rank_NL.T


def _unmet_item(
    met_E: Int[jax.Array, " E"],
    start_L: Int[jax.Array, " L"],
    stop_L: Int[jax.Array, " L"],
    rank_LN: Int[jax.Array, "L N"],
    most: int,
) -> Int[jax.Array, "L N"]:
    """The item of that rank among those that the user never met; he met `most` items at most.

    It is the rank plus the number j of met items below it: those whose id less their own rank among
    the met is at most the rank. That difference never falls, so j is found by halving.
    """

    def halve(_, bounds):
        low_LN, high_LN = bounds
        middle_LN = (low_LN + high_LN) // 2
        unmet_below_LN = met_E[middle_LN] - (middle_LN - start_L[:, None])
        below_LN = (low_LN < high_LN) & (unmet_below_LN <= rank_LN)
        return jnp.where(below_LN, middle_LN + 1, low_LN), jnp.where(below_LN, high_LN, middle_LN)

    low_LN = jnp.broadcast_to(start_L[:, None], rank_LN.shape)
    high_LN = jnp.broadcast_to(stop_L[:, None], rank_LN.shape)
    low_LN, _ = jax.lax.fori_loop(0, most.bit_length(), halve, (low_LN, high_LN))
    return rank_LN + low_LN - start_L[:, None]
