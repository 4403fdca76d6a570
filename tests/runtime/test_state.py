"""A step is the same however its examples are cut, and a bad one changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo4rec_jax.runtime import state as training
from dpo4rec_jax.runtime.state import Sums, fingerprint

OPTIMIZER = optax.adam(0.1)


def schedule(step):
    return 0.1


def squared_error(trainable, frozen, batch, key):
    error = batch["x"] @ trainable["w"] + frozen - batch["y"]
    each = jnp.where(batch["mask"], error**2, 0.0)
    weight = batch["mask"].sum().astype(jnp.float32)
    return Sums(each.sum(), weight, {"error": jnp.where(batch["mask"], error, 0.0).sum()})


def batch(rows, size, seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(16, 3)), rng.normal(size=16)
    filled = [*rows, *[rows[0]] * (size - len(rows))]
    arrays = {"x": x[filled], "y": y[filled]}
    mask = np.arange(size) < len(rows)
    return {name: jnp.asarray(a, jnp.float32) for name, a in arrays.items()} | {"mask": mask}


def fresh(accumulating):
    trainable = {"w": jnp.array([1.0, -2.0, 0.5])}
    return training.create(
        trainable, OPTIMIZER, seed=3, figures=("error",) if accumulating else None
    )


def one_step(parts, size):
    state = fresh(accumulating=True)
    for rows in parts:
        state = training.accumulate(squared_error, state, jnp.float32(0.1), batch(rows, size))
    return training.update(OPTIMIZER, schedule, state)


@pytest.mark.parametrize(
    "parts",
    [[[0, 1, 2, 3], [4, 5, 6, 7]], [[0], [1, 2, 3, 4, 5, 6], [7]], [[7, 6, 5], [4, 3, 2, 1, 0]]],
)
def test_unequal_padded_microbatches_give_the_step_of_one_batch(parts):
    whole, figures = one_step([[0, 1, 2, 3, 4, 5, 6, 7]], size=8)
    cut, figures_cut = one_step(parts, size=6)
    np.testing.assert_allclose(cut.trainable["w"], whole.trainable["w"], rtol=1e-6)
    for name in figures:
        np.testing.assert_allclose(figures_cut[name], figures[name], rtol=1e-5)


def test_fused_step_equals_accumulate_then_update():
    whole, figures = one_step([[0, 1, 2]], size=3)
    step = training.step(squared_error, OPTIMIZER, schedule)
    state, figures_fused = step(fresh(accumulating=False), jnp.float32(0.1), batch([0, 1, 2], 3))
    np.testing.assert_array_equal(state.trainable["w"], whole.trainable["w"])
    assert state.pending is None
    assert figures.keys() == figures_fused.keys()


def test_figures_are_means_over_real_examples():
    _, figures = one_step([[0, 1]], size=5)
    arrays = batch([0, 1], 2)
    error = arrays["x"] @ jnp.array([1.0, -2.0, 0.5]) + 0.1 - arrays["y"]
    np.testing.assert_allclose(figures["loss"], (error**2).mean(), rtol=1e-6)
    np.testing.assert_allclose(figures["error"], error.mean(), rtol=1e-5)
    gradient = 2 * (error[:, None] * arrays["x"]).mean(axis=0)
    np.testing.assert_allclose(figures["grad_norm"], jnp.linalg.norm(gradient), rtol=1e-5)


def test_step_that_is_not_finite_changes_nothing_but_the_counts():
    before = fresh(accumulating=True)
    bad = batch([0, 1], 2) | {"y": jnp.array([jnp.nan, 0.0])}
    state, _ = training.update(
        OPTIMIZER, schedule, training.accumulate(squared_error, before, jnp.float32(0.1), bad)
    )
    np.testing.assert_array_equal(state.trainable["w"], before.trainable["w"])
    jax.tree.map(np.testing.assert_array_equal, state.optimizer, before.optimizer)
    assert (int(state.skipped), int(state.skipped_in_a_row), int(state.step)) == (1, 1, 1)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.pending))
    state = training.accumulate(squared_error, state, jnp.float32(0.1), batch([0, 1], 2))
    state, _ = training.update(OPTIMIZER, schedule, state)
    assert (int(state.skipped), int(state.skipped_in_a_row)) == (1, 0)


def test_gradient_of_low_precision_weights_is_accumulated_in_float32():
    state = training.create({"w": jnp.ones(3, jnp.bfloat16)}, OPTIMIZER, seed=0, figures=("error",))
    state = training.accumulate(squared_error, state, jnp.float32(0.0), batch([0, 1], 2))
    assert state.pending.gradient["w"].dtype == jnp.float32


def test_every_microbatch_draws_other_randomness_and_a_seed_repeats_it():
    def noise(trainable, frozen, batch, key):
        return Sums(trainable["w"].sum() * 0, jnp.float32(1), {"error": jax.random.normal(key)})

    draws = []
    for seed in (0, 0, 1):
        state = training.create({"w": jnp.ones(1)}, OPTIMIZER, seed, figures=("error",))
        for _ in range(2):
            state = training.accumulate(noise, state, None, {})
            state, figures = training.update(OPTIMIZER, schedule, state)
            draws.append(float(figures["error"]))
    assert draws[0:2] == draws[2:4]
    assert len(set(draws)) == 4


TREE = {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(5, jnp.bfloat16)}


class TestFingerprint:
    def test_is_the_same_for_equal_values(self):
        assert fingerprint(TREE) == fingerprint(jax.tree.map(lambda x: x + 0, TREE))

    @pytest.mark.parametrize(
        "change",
        [
            lambda t: t | {"a": t["a"].at[1, 2].add(1e-6)},
            lambda t: t | {"a": t["a"].at[0].set(t["a"][1]).at[1].set(t["a"][0])},
            lambda t: t | {"a": t["a"].reshape(4, 3)},
            lambda t: t | {"b": t["b"].at[4].set(-1.0)},
            lambda t: {"a": t["a"], "c": t["b"]},
        ],
        ids=["one value", "rows swapped", "shape", "a sign", "a name"],
    )
    def test_changes_with(self, change):
        assert fingerprint(change(TREE)) != fingerprint(TREE)
