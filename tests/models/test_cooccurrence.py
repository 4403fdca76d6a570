"""Item embeddings before training: the counts by hand, the factors by a dense SVD."""

from __future__ import annotations

import numpy as np
import pytest

from dpo4rec_jax.models import cooccurrence
from dpo4rec_jax.models.cooccurrence import spectrum


def sequences(users: int, items: int, groups: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Every user meets six items in turn from each of three groups."""
    random = np.random.default_rng(seed)
    group_I = np.arange(items) % groups
    met = [
        random.choice(np.flatnonzero(group_I == group), 6, replace=False)
        for _ in range(users)
        for group in random.choice(groups, 3, replace=False)
    ]
    return np.repeat(np.arange(users), 18), np.concatenate(met)


def information(user_P: np.ndarray, item_P: np.ndarray, items: int, list_size: int) -> np.ndarray:
    """The matrix that is factorised, pair by pair."""
    count_II = np.zeros((items, items))
    for at, (user, item) in enumerate(zip(user_P, item_P, strict=True)):
        for apart in range(1, list_size):
            if at + apart < len(user_P) and user_P[at + apart] == user:
                count_II[item, item_P[at + apart]] += list_size - apart
                count_II[item_P[at + apart], item] += list_size - apart
    total_I = count_II.sum(1)
    smooth_I = total_I**0.75 / (total_I**0.75).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        weight_II = np.log(count_II / (total_I[:, None] * smooth_I[None]))
    weight_II = np.where(count_II > 0, np.maximum(weight_II, 0.0), 0.0)
    return (weight_II + weight_II.T) / 2


@pytest.mark.parametrize("dense", [512, 10])
def test_coordinates_are_the_leading_singular_vectors_of_the_information(dense, monkeypatch):
    monkeypatch.setattr(cooccurrence, "DENSE", dense)
    user_P, item_P = sequences(users=40, items=30, groups=5)
    point_ID = spectrum(user_P, item_P, 31, size=6, list_size=4)  # an item more, met by nobody
    weight_II = information(user_P, item_P, 31, 4)
    left, value, _ = np.linalg.svd(weight_II)
    expected_ID = left[:, :6] * np.sqrt(value[:6])
    expected_ID /= np.sqrt((expected_ID**2).mean())
    sign_D = np.sign((point_ID * expected_ID).sum(0))
    np.testing.assert_allclose(point_ID * sign_D, expected_ID, atol=2e-4)
    assert not point_ID[30].any()
    np.testing.assert_allclose((point_ID**2).mean(), 1.0, rtol=1e-5)


def test_items_that_are_met_together_lie_together():
    user_P, item_P = sequences(users=300, items=600, groups=20)
    point_ID = spectrum(user_P, item_P, 600, size=16, list_size=4)
    unit_ID = point_ID / np.linalg.norm(point_ID, axis=1, keepdims=True)
    near_II = unit_ID @ unit_ID.T
    group_I = np.arange(600) % 20
    same_II = (group_I[:, None] == group_I[None]) & ~np.eye(600, dtype=bool)
    other_II = group_I[:, None] != group_I[None]
    assert near_II[same_II].mean() > 0.5
    assert np.abs(near_II[other_II].mean()) < 0.1


def test_small_and_empty_data():
    user_P, item_P = np.array([0, 0, 1]), np.array([0, 1, 2])
    assert spectrum(user_P, item_P, 3, size=32, list_size=4).shape == (3, 3)
    assert spectrum(user_P, item_P, 3, size=32, list_size=1).shape == (3, 0)
    nobody = np.array([], np.int64)
    assert spectrum(nobody, nobody, 3, size=32, list_size=4).shape == (3, 0)


def test_users_are_not_neighbours_of_each_other():
    point_ID = spectrum(np.array([0, 0, 1, 1]), np.array([0, 1, 2, 3]), 4, size=4, list_size=4)
    near_II = point_ID @ point_ID.T
    assert abs(near_II[1, 2]) < 1e-5 < near_II[0, 0]
