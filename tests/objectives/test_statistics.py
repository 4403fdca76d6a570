"""Resampling tests against exact enumeration, closed forms and scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from dpo4rec_jax.objectives.statistics import (
    bootstrap_sums,
    draw_seeds,
    holm,
    interval95,
    sign_flip_p_values,
    user_sums,
)


def test_lists_are_summed_by_user_and_nan_lists_left_out() -> None:
    value_SL = np.array([[0.1, 0.2, np.nan, 0.4], [0.5, 0.6, np.nan, 0.8]])
    sums = user_sums(value_SL, np.array([7, 7, 7, 2]))
    np.testing.assert_allclose(sums.sum_SU, [[0.4, 0.1 + 0.2], [0.8, 0.5 + 0.6]])  # users 2, 7
    np.testing.assert_array_equal(sums.count_U, [1, 2])


def test_a_list_left_out_for_one_seed_alone_is_refused() -> None:
    with pytest.raises(AssertionError, match="some seeds only"):
        user_sums(np.array([[0.1, np.nan], [0.1, 0.2]]), np.array([0, 1]))


def test_five_equal_signs_have_p_two_in_thirty_two() -> None:
    difference_U1 = np.array([0.3, 0.1, 0.2, 0.5, 0.4])[:, None]
    assert sign_flip_p_values(difference_U1, resamples=10000, seed=0) == pytest.approx(2 / 32)


def test_few_users_are_enumerated_exactly() -> None:
    random = np.random.default_rng(0)
    difference_UX = random.normal(0.3, 1.0, (5, 3))
    got = sign_flip_p_values(difference_UX, resamples=32, seed=0)
    for column, p_value in enumerate(got):
        difference = difference_UX[:, column]
        flipped = [
            abs(sum(sign * d for sign, d in zip(signs, difference, strict=True)))
            for signs in itertools.product([1, -1], repeat=5)
        ]
        reached = sum(value >= abs(difference.sum()) - 1e-12 for value in flipped)
        assert p_value == pytest.approx(reached / 32)


def test_many_users_agree_with_scipy_within_the_error_of_the_draws() -> None:
    stats = pytest.importorskip("scipy.stats")
    difference_U = np.random.default_rng(1).normal(0.2, 1.0, 200)
    expected = stats.permutation_test(
        (difference_U,),
        np.mean,
        permutation_type="samples",
        n_resamples=20000,
        rng=np.random.default_rng(2),
    ).pvalue
    (got,) = sign_flip_p_values(difference_U[:, None], resamples=20000, seed=3)
    error = math.sqrt(expected * (1 - expected) / 20000)
    assert 0.005 < expected < 0.2
    assert abs(got - expected) < 5 * math.sqrt(2) * error


def test_no_difference_has_p_one_and_a_huge_one_never_p_zero() -> None:
    random = np.random.default_rng(4)
    same, huge = np.zeros(50), 5.0 + random.random(50)
    p_same, p_huge = sign_flip_p_values(np.stack([same, huge], 1), resamples=999, seed=0)
    assert p_same == 1.0
    assert p_huge == pytest.approx(1 / 1000)


def test_p_values_are_uniform_where_nothing_differs() -> None:
    difference_UX = np.random.default_rng(5).normal(size=(40, 400))
    p_values = sign_flip_p_values(difference_UX, resamples=2000, seed=6)
    # 400 draws of a uniform: standard error of the share below 0.1 is 0.015.
    assert abs(np.mean(p_values < 0.1) - 0.1) < 0.05
    assert abs(np.mean(p_values) - 0.5) < 0.06


def test_bootstrap_spreads_as_the_standard_error_says() -> None:
    value_U = np.random.default_rng(7).normal(2.0, 1.0, 300)
    columns_UX = np.stack([value_U, np.ones(300)], axis=1)
    sums_RX = bootstrap_sums(columns_UX, resamples=4000, seed=8)
    np.testing.assert_array_equal(sums_RX[:, 1], 300.0)  # each resample draws so many users
    mean_R = sums_RX[:, 0] / sums_RX[:, 1]
    assert mean_R.mean() == pytest.approx(value_U.mean(), abs=0.01)
    assert mean_R.std() == pytest.approx(value_U.std() / math.sqrt(300), rel=0.05)
    low, high = interval95(mean_R)
    half = 1.96 * value_U.std() / math.sqrt(300)
    assert (low, high) == pytest.approx((value_U.mean() - half, value_U.mean() + half), abs=0.01)


def test_resamples_are_the_same_however_they_are_chunked(monkeypatch) -> None:
    value_UX = np.random.default_rng(9).normal(size=(30, 2))
    whole = bootstrap_sums(value_UX, resamples=100, seed=1)
    monkeypatch.setattr("dpo4rec_jax.objectives.statistics.CHUNK", 70)
    np.testing.assert_allclose(whole, bootstrap_sums(value_UX, resamples=100, seed=1))


def test_seeds_drawn_with_replacement_spread_by_their_own_error() -> None:
    value_RS = np.broadcast_to([1.0, 2.0, 3.0, 4.0, 5.0], (20000, 5))
    mean_R = draw_seeds(value_RS, seed=0)
    assert mean_R.mean() == pytest.approx(3.0, abs=0.02)
    assert mean_R.std() == pytest.approx(math.sqrt(2.0 / 5), rel=0.03)  # variance 2 over 5 draws


def test_holm_multiplies_the_smallest_by_all_and_never_reverses_the_order() -> None:
    got = holm(np.array([0.01, 0.04, 0.03, 0.005]))
    # Sorted 0.005 * 4, 0.01 * 3, 0.03 * 2, then 0.04 * 1 raised to what came before it.
    np.testing.assert_allclose(got, [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.6, 0.7])), [1.0, 1.0])
    assert holm(np.array([])).size == 0
