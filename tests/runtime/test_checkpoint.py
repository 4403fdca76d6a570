import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo4rec_jax.config import InputError
from dpo4rec_jax.runtime import state as training
from dpo4rec_jax.runtime.checkpoint import Checkpoints, load_arrays, save_arrays


def state_of(value):
    trainable = {"w": jnp.full((64, 64), value), "b": jnp.full(3, value, jnp.bfloat16)}
    return training.create(trainable, optax.adam(0.1), seed=7, figures=("loss",))


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_restores_state_and_position_bitwise(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state_of(1 / 3), {"next_index": 3})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 3
        state, position = checkpoints.restore(3, like=state_of(0.0))
    assert_equal(state, state_of(1 / 3))
    assert position == {"next_index": 3}
    assert isinstance(state, training.TrainState)


def test_only_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for number in (1, 2, 3):
            checkpoints.save(number, state_of(number), {})
        checkpoints.wait()
        kept = sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit())
        assert kept == [2, 3]


def test_donating_the_state_after_save_does_not_change_what_was_saved(tmp_path):
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 + 1, s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        state = state_of(1 / 3)
        for number in (1, 2):
            checkpoints.save(number, state, {})
            state = overwrite(state)
        first, _ = checkpoints.restore(1, like=state_of(0.0))
    assert_equal(first, state_of(1 / 3))


def test_another_runs_checkpoint_is_refused_with_its_path(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1.0), {})
        checkpoints.wait()
        other = training.create({"v": jnp.ones(2)}, optax.adam(0.1), seed=7)
        with pytest.raises(InputError, match=r"1: damaged, or not a checkpoint of this run"):
            checkpoints.restore(1, like=other)


def test_of_a_damaged_checkpoint_and_an_older_one_the_older_is_restored(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for number in (1, 2):
            checkpoints.save(number, state_of(float(number)), {"at": number})
        checkpoints.wait()
        for path in (tmp_path / "2").rglob("*"):
            if path.is_file() and path.stat().st_size:
                os.truncate(path, path.stat().st_size // 2)
        number, state, position = checkpoints.restore_newest(like=state_of(0.0))
        assert (number, position) == (1, {"at": 1})
        assert_equal(state, state_of(1.0))


def test_nested_arrays_come_back_with_names_and_dtypes(tmp_path):
    tree = {
        "adaptor": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)},
        "count": np.int64(5),
        "flag": np.array([True, False]),
    }
    save_arrays(tmp_path / "deep" / "x.safetensors", tree, {"made_by": "test"})
    back = load_arrays(tmp_path / "deep" / "x.safetensors")
    assert back.keys() == tree.keys()
    assert_equal(back, tree)
    assert back["flag"].dtype == bool
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.safetensors"]


def test_views_are_saved_in_their_own_order(tmp_path):
    kernel = np.arange(6.0).reshape(2, 3).T
    save_arrays(tmp_path / "x", {"kernel": kernel})
    np.testing.assert_array_equal(load_arrays(tmp_path / "x")["kernel"], kernel)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_missing_or_damaged_arrays_are_the_users_one_line(tmp_path, content):
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.safetensors: cannot read"):
        load_arrays(path)
