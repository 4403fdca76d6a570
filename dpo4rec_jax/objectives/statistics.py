"""Whether a difference between two arms is more than the luck of the test users.

A user's lists are not independent, so everything is resampled by user: metrics of single lists are
summed to one number a user first. Columns X are whatever is compared at once; they share each
resample, so differences between them stay paired.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num

CHUNK = 2**22  # elements of one block of resampling weights


class UserSums(NamedTuple):
    """Sums over each user's lists, and of how many; NaN lists are left out of both."""

    sum_SU: Float[np.ndarray, "S U"]
    count_U: Float[np.ndarray, " U"]


def user_sums(value_SL: Float[np.ndarray, "S L"], user_L: Int[np.ndarray, " L"]) -> UserSums:
    """Per-list values of S seeds, summed by user; users in ascending order of their index.

    A list must be NaN for all seeds or for none: whether it counts is a matter of its labels.
    """
    _, place_L = np.unique(user_L, return_inverse=True)
    num_users = int(place_L.max(initial=-1)) + 1
    left_out_SL = np.isnan(value_SL)
    assert (left_out_SL == left_out_SL[:1]).all(), "a list left out for some seeds only"
    value_SL = np.where(left_out_SL, 0.0, value_SL).astype(np.float64)
    sum_SU = np.stack([np.bincount(place_L, row_L, num_users) for row_L in value_SL])
    count_U = np.bincount(place_L, ~left_out_SL[0], num_users)
    return UserSums(sum_SU, count_U)


def sign_flip_p_values(
    difference_UX: Float[np.ndarray, "U X"], *, resamples: int, seed: int
) -> Float[np.ndarray, " X"]:
    """Two-sided p-values of the paired permutation test: under no difference, the sign of each
    user's difference is a coin.

    All 2^U signs are enumerated where that takes no more than `resamples`; else so many are drawn,
    and the observed one counts among them (Phipson and Smyth 2010), so p is never 0.
    """
    num_users = len(difference_UX)
    observed_X = np.abs(difference_UX.sum(0))
    # A flipped sum that is equal but for rounding must count as equal.
    bound_X = observed_X - 1e-12 * np.abs(difference_UX).sum(0)
    if 2**num_users <= resamples:
        codes = np.arange(2**num_users)[:, None] >> np.arange(num_users)
        sums_RX = (1.0 - 2.0 * (codes & 1)) @ difference_UX
        return (np.abs(sums_RX) >= bound_X[None]).mean(0)
    random = np.random.default_rng(seed)
    reached_X = np.ones(difference_UX.shape[1])
    for num_rows in _chunks(resamples, num_users):
        bits = np.frombuffer(random.bytes(num_rows * (num_users // 8 + 1)), np.uint8)
        coins = np.unpackbits(bits.reshape(num_rows, -1), axis=1)[:, :num_users]
        sums_RX = (1.0 - 2.0 * coins) @ difference_UX
        reached_X += (np.abs(sums_RX) >= bound_X[None]).sum(0)
    return reached_X / (resamples + 1)


def bootstrap_sums(
    sum_UX: Float[np.ndarray, "U X"], *, resamples: int, seed: int
) -> Float[np.ndarray, "R X"]:
    """Totals over users drawn with replacement, one row a resample."""
    random, num_users = np.random.default_rng(seed), len(sum_UX)
    blocks = []
    for num_rows in _chunks(resamples, num_users):
        drawn = random.integers(0, num_users, (num_rows, num_users))
        flat = drawn + num_users * np.arange(num_rows)[:, None]
        times = np.bincount(flat.ravel(), minlength=num_rows * num_users)
        blocks.append(times.reshape(num_rows, num_users) @ sum_UX)
    return np.concatenate(blocks)


def draw_seeds(value_RS: Float[np.ndarray, "R S"], *, seed: int) -> Float[np.ndarray, " R"]:
    """Means over seeds drawn with replacement, anew in every resample."""
    resamples, num_seeds = value_RS.shape
    drawn = np.random.default_rng(seed).integers(0, num_seeds, (resamples, num_seeds))
    return np.take_along_axis(value_RS, drawn, axis=1).mean(1)


def interval95(value_R: Num[np.ndarray, " R"]) -> tuple[float, float]:
    """The middle 95 % of a bootstrap distribution (percentile interval)."""
    low, high = np.quantile(value_R, [0.025, 0.975])
    return float(low), float(high)


def holm(p_value_X: Float[np.ndarray, " X"]) -> Float[np.ndarray, " X"]:
    """p-values adjusted for their number (Holm 1979): below 0.05, the whole family errs in at most
    one case in twenty."""
    num_tests = len(p_value_X)
    order = np.argsort(p_value_X, kind="stable")
    stepped = np.maximum.accumulate(p_value_X[order] * (num_tests - np.arange(num_tests)))
    adjusted_X = np.empty(num_tests)
    adjusted_X[order] = np.minimum(stepped, 1.0)
    return adjusted_X


def _chunks(resamples: int, num_users: int) -> list[int]:
    """Rows of each block so that no block of weights exceeds CHUNK elements."""
    rows = max(1, min(resamples, CHUNK // max(1, num_users)))
    return [min(rows, resamples - start) for start in range(0, resamples, rows)]
