"""What `rank.ease` says of every user and item of a prepared data set, made once a process."""

from __future__ import annotations

import threading
import weakref

import numpy as np
from jaxtyping import Bool, Float32

from dpo4rec_jax.config import InputError
from dpo4rec_jax.data.prepared import TRAIN, Prepared
from dpo4rec_jax.models import ease

MOST_BYTES = 8 * 2**30

_made: weakref.WeakKeyDictionary[Prepared, dict[float, np.ndarray]] = weakref.WeakKeyDictionary()
_making = threading.Lock()  # arms are trained side by side


def affinities_of(prepared: Prepared, ridge: float) -> Float32[np.ndarray, "U I"]:
    """How well every item fits what each user likes in the window (`ease.affinities`), learned from
    the windows and lists of training users.

    Raises InputError for more users and items than fit, and for a ridge too small for them.
    """
    check_size(prepared)
    with _making:
        kept = _made.setdefault(prepared, {})
        if ridge not in kept:
            kept[ridge] = ease.affinities(*likes(prepared), ridge)
        found_UI = kept[ridge]
    if not np.isfinite(found_UI).all():
        raise InputError(f"rank.ease: a ridge of {ridge:g} is too small for this data; raise it")
    return found_UI


def check_size(prepared: Prepared) -> None:
    """Raises InputError for a table that would not fit."""
    users, items = len(prepared.user_id), len(prepared.item_id)
    # Two tables of flags and one of floats; the likes of all pairs of items and three like it.
    if (size := items * (6 * users + 16 * items)) > MOST_BYTES:
        raise InputError(
            f"rank.ease: expected to take at most {MOST_BYTES / 2**30:.0f} GiB, got "
            f"{size / 2**30:.0f} for {users} users and {items} items; leave it null"
        )


def likes(
    prepared: Prepared,
) -> tuple[Bool[np.ndarray, "U I"], Bool[np.ndarray, "U I"]]:
    """All that training users like, and what each user likes in the window."""
    shape = len(prepared.user_id), len(prepared.item_id)
    place = {item: index for index, item in enumerate(prepared.item_id)}
    window_UI, liked_UI = np.zeros(shape, bool), np.zeros(shape, bool)
    for window_I, user in zip(window_UI, prepared.users, strict=True):
        window_I[[place[item] for item in user["likes"]]] = True
    list_L, at_L = np.nonzero(prepared.mask_LN & (prepared.label_LN > 0))
    liked_UI[prepared.user_L[list_L], prepared.item_LN[list_L, at_L]] = True
    liked_UI |= window_UI
    liked_UI[prepared.split_U != TRAIN] = False
    return liked_UI, window_UI
