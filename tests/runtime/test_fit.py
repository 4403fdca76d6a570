"""Members trained together: each as if alone, on its own examples, kept at its own best epoch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo4rec_jax.runtime.epoch import Problem, Schedule
from dpo4rec_jax.runtime.fit import CAPACITY_STEP, Diverged, fit

EXAMPLES, WIDTH = 37, 3
SCHEDULE = Schedule(epochs=4, batch=8, learning_rate=0.3, patience=10)


def make_data(seed: int = 0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(EXAMPLES, WIDTH)).astype(np.float32)
    return {"x": jnp.asarray(x), "y": jnp.asarray(x.sum(1))}


def squared_error(params, data, drawn, index_B, key, capacity):
    return (data["x"][index_B] @ params["w"] - data["y"][index_B]) ** 2


def minus_error(params, data):
    return -((data["x"] @ params["w"] - data["y"]) ** 2).mean()


LINEAR = Problem(squared_error, minus_error)


def first_params(members: int):
    random = np.random.default_rng(1)
    return {"w": jnp.asarray(random.normal(size=(members, WIDTH)), jnp.float32)}


def run(draws_RL, problem=LINEAR, data=None, schedule=SCHEDULE, params=None, **options):
    params = first_params(len(draws_RL)) if params is None else params
    data = make_data() if data is None else data
    return fit(problem, params, data, draws_RL, jax.random.key(0), schedule, **options)


def test_members_learn_and_the_best_epoch_is_what_the_curve_says():
    fitted = run(np.ones((3, EXAMPLES), bool))
    assert (fitted.best_R > -0.5).all()
    np.testing.assert_array_equal(fitted.best_epoch_R, fitted.validation_ER.argmax(0))
    np.testing.assert_array_equal(fitted.best_R, fitted.validation_ER.max(0))
    for member in range(3):
        params = jax.tree.map(lambda leaf, m=member: leaf[m], fitted.params_R)
        assert float(minus_error(params, make_data())) == pytest.approx(fitted.best_R[member])


def test_a_member_never_learns_from_examples_it_may_not_draw():
    draws_RL = np.ones((2, EXAMPLES), bool)
    draws_RL[1, 20:] = False
    data = make_data()
    spoilt = {**data, "y": data["y"].at[20:].add(100.0)}
    # the same validation for both: only the examples differ
    problem = replace(LINEAR, validate=lambda params, data: -(params["w"] ** 2).sum())
    one, other = run(draws_RL, problem, data), run(draws_RL, problem, spoilt)
    np.testing.assert_array_equal(one.loss_ER[:, 1], other.loss_ER[:, 1])
    np.testing.assert_array_equal(one.params_R["w"][1], other.params_R["w"][1])
    assert (one.loss_ER[:, 0] != other.loss_ER[:, 0]).all()


SEEN = Problem(
    loss=lambda params, data, drawn, index_B, key, capacity: data["y"][index_B] * params["w"],
    validate=lambda params, data: jnp.zeros(()),
)


def test_every_example_is_seen_once_an_epoch():
    data = {"y": jnp.ones(EXAMPLES)}
    schedule = replace(SCHEDULE, epochs=1, batch=EXAMPLES, learning_rate=1e-9)
    fitted = run(np.ones((2, EXAMPLES), bool), SEEN, data, schedule, {"w": jnp.ones(2)})
    np.testing.assert_allclose(fitted.loss_ER, 1.0)


def test_every_epoch_refreshes_the_data_that_it_was_given():
    refreshed = replace(SEEN, refresh=lambda data, epoch: {"y": data["y"] * (2 + epoch)})
    data = {"y": jnp.ones(EXAMPLES)}
    schedule = replace(SCHEDULE, epochs=3, batch=EXAMPLES, learning_rate=1e-9)
    fitted = run(np.ones((1, EXAMPLES), bool), refreshed, data, schedule, {"w": jnp.ones(1)})
    np.testing.assert_allclose(fitted.loss_ER[:, 0], [2.0, 3.0, 4.0], rtol=1e-6)


def test_the_loss_is_a_mean_over_real_examples_whatever_the_padding():
    constant = replace(
        LINEAR,
        loss=lambda params, data, drawn, index_B, key, capacity: 2.0 + 0 * data["y"][index_B],
    )
    draws_RL = np.zeros((2, EXAMPLES), bool)
    draws_RL[0], draws_RL[1, :3] = True, True
    fitted = run(draws_RL, constant, schedule=replace(SCHEDULE, epochs=1, batch=2))
    assert fitted.loss_ER[0, 0] == 2.0
    # three examples in nineteen batches: the batches without any count 0
    assert fitted.loss_ER[0, 1] in (2.0 * 2 / 19, np.float32(2.0 * 3 / 19))


def test_patience_stops_all_only_when_each_has_run_out():
    worse = replace(LINEAR, validate=lambda params, data: jnp.zeros(()))
    epochs = []
    run(
        np.ones((2, EXAMPLES), bool),
        worse,
        schedule=replace(SCHEDULE, epochs=9, patience=2),
        on_epoch=lambda epoch, loss_R, validation_R: epochs.append(epoch),
    )
    assert epochs == [0, 1, 2]


def test_capacity_covers_the_largest_demand_of_the_epoch():
    seen = []

    def loss(params, data, drawn, index_B, key, capacity):
        seen.append(capacity)
        return squared_error(params, data, drawn, index_B, key, capacity)

    def demand(data, index_B):
        return 100 + index_B.max()

    run(np.ones((1, EXAMPLES), bool), replace(LINEAR, loss=loss, demand=demand))
    assert set(seen) == {2 * CAPACITY_STEP}


def test_draws_are_made_once_an_epoch_and_differ_by_epoch_and_member():
    problem = Problem(
        loss=lambda params, data, drawn, index_B, key, capacity: jnp.full(index_B.shape, drawn),
        validate=lambda params, data: jnp.zeros(()),
        draw=lambda data, key: jax.random.uniform(key),
    )
    schedule = replace(SCHEDULE, batch=EXAMPLES, epochs=3)
    drawn_ER = run(np.ones((2, EXAMPLES), bool), problem, schedule=schedule).loss_ER
    assert len(np.unique(drawn_ER)) == 6


def test_the_same_key_gives_the_same_result_and_another_another():
    draws_RL = np.ones((1, EXAMPLES), bool)
    fitting = partial(fit, LINEAR, first_params(1), make_data(), draws_RL)
    first, again, other = (
        fitting(jax.random.key(seed), SCHEDULE).params_R["w"] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0


def with_nan(data, examples):
    """The targets of these examples are NaN."""
    return {**data, "y": data["y"].at[jnp.asarray(examples)].set(jnp.nan)}


def test_a_batch_with_nan_is_skipped_counted_and_changes_nothing():
    """One step an epoch: the epochs of member 1, who draws the NaN, all leave it as it was."""
    draws_RL = np.ones((2, EXAMPLES), bool)
    draws_RL[0, 5] = False
    whole = replace(SCHEDULE, batch=EXAMPLES)
    data = with_nan(make_data(), [5])
    fitted = fit(
        Problem(squared_error, lambda params, data: params["w"].sum() * 0 - 1),
        first_params(2), data, draws_RL, jax.random.key(0), whole, max_skipped=9,
    )  # fmt: skip
    np.testing.assert_array_equal(fitted.skipped_R, [0, SCHEDULE.epochs])
    np.testing.assert_array_equal(fitted.params_R["w"][1], first_params(2)["w"][1])
    assert np.isnan(fitted.loss_ER[:, 1]).all() and np.isfinite(fitted.loss_ER[:, 0]).all()
    assert np.isfinite(np.asarray(fitted.params_R["w"])).all()


def test_a_member_trains_on_around_the_batches_that_it_skips():
    data = with_nan(make_data(), [5])
    finite = Problem(squared_error, lambda params, data: -jnp.abs(params["w"] - 1.0).sum())
    schedule = replace(SCHEDULE, epochs=12, patience=12)
    fitted = run(np.ones((1, EXAMPLES), bool), finite, data, schedule)
    assert fitted.skipped_R[0] == 12  # the batch that drew it, once an epoch
    assert np.isfinite(fitted.loss_ER).all()
    assert fitted.best_R[0] > -0.2


def test_nan_in_a_row_raises_with_the_batches_and_the_best_so_far():
    data = with_nan(make_data(), [5])
    whole = replace(SCHEDULE, batch=EXAMPLES, epochs=9)
    with pytest.raises(Diverged, match="in 3 steps in a row, up to step 0 of epoch 2") as caught:
        run(np.ones((1, EXAMPLES), bool), LINEAR, data, whole, max_skipped=3)
    batches = caught.value.batches
    assert [(b["member"], b["epoch"], b["step"]) for b in batches] == [(0, e, 0) for e in range(3)]
    assert sorted(batches[0]["examples"]) == list(range(EXAMPLES))
    np.testing.assert_array_equal(caught.value.fitted.params_R["w"], first_params(1)["w"])
