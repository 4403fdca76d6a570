"""What a training run is fed, in which order, and where a resumed one goes on."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo4rec_jax.config import InputError
from dpo4rec_jax.runtime.loader import (
    Feed,
    Rows,
    Shape,
    batch_of,
    in_order,
    merge_shapes,
    shuffled,
)


def rows_of(lengths, completions=2):
    prompts = [list(range(1, n + 1)) for n in lengths]
    texts = [[[7] * (1 + (n + c) % 5) for c in range(completions)] for n in lengths]
    return Rows(prompts, texts, {"gap": np.arange(len(lengths), dtype=np.float32)})


ROWS = rows_of([3, 50, 17, 33, 8, 90, 41, 12, 60, 25, 5])
OPTIONS = {"seed": 1, "epochs": 2, "step_rows": 4, "microbatch_rows": 2, "max_shapes": 2}


def test_each_epoch_holds_every_row_once_in_another_order():
    order = [row for m in shuffled(ROWS, **OPTIONS) for row in m.rows]
    first, second = order[:11], order[11:]
    assert sorted(first) == sorted(second) == list(range(11))
    assert first != second


def test_steps_end_after_their_rows_and_at_the_end_of_an_epoch():
    sizes, size = [], 0
    for microbatch in shuffled(ROWS, **OPTIONS):
        size += len(microbatch.rows)
        if microbatch.ends_step:
            sizes.append(size)
            size = 0
    assert sizes == [4, 4, 3, 4, 4, 3]
    assert size == 0


def test_order_is_a_function_of_the_seed():
    assert shuffled(ROWS, **OPTIONS) == shuffled(ROWS, **OPTIONS)
    assert shuffled(ROWS, **OPTIONS) != shuffled(ROWS, **(OPTIONS | {"seed": 2}))


def test_the_rows_of_a_step_do_not_depend_on_microbatch_size():
    def steps(microbatch_rows):
        grouped, current = [], []
        for m in shuffled(ROWS, **(OPTIONS | {"microbatch_rows": microbatch_rows})):
            current += m.rows
            if m.ends_step:
                grouped.append(sorted(current))
                current = []
        return grouped

    assert steps(1) == steps(2) == steps(3) == steps(4)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=25),
    st.integers(1, 4),
)
def test_merged_shapes_are_few_and_hold_their_members(pairs, most):
    shapes = [Shape(*pair) for pair in pairs]
    merged = merge_shapes(shapes, most, completions=2)
    assert len(set(merged.values())) <= most
    assert merged.keys() == set(shapes)
    for member, shape in merged.items():
        assert shape.prompt >= member.prompt
        assert shape.completion >= member.completion


def test_shapes_that_are_close_are_the_ones_merged():
    merged = merge_shapes([Shape(16, 16), Shape(512, 16), Shape(528, 16)], 2)
    assert merged[Shape(16, 16)] == Shape(16, 16)
    assert merged[Shape(512, 16)] == merged[Shape(528, 16)] == Shape(528, 16)


@pytest.mark.parametrize("pack", [False, True])
def test_every_row_fits_its_microbatch_and_compilations_are_bounded(pack):
    rows = Rows(ROWS.prompts, [[[1] * len(p), [2] * (i + 1)] for i, p in enumerate(ROWS.prompts)])
    microbatches = shuffled(rows, **OPTIONS, pack=pack)
    assert len({m.shape for m in microbatches}) <= OPTIONS["max_shapes"]
    for m in microbatches:
        assert bool(m.shape.packed) == pack
        held = 3 if pack else 2
        assert (rows.shapes[list(m.rows), :held] <= np.array(m.shape[:held])).all()


def test_packed_completions_stand_behind_each_other():
    rows = Rows([[5], [9]], [[[2], [0, 0]], [[1, 2, 3], []]])
    batch = batch_of(rows, [0, 1], Shape(4, 3, 4), size=2)
    np.testing.assert_array_equal(batch["packed_BW"], [[0, 3, 4, -1], [0, 1, 2, -1]])


def test_packing_saves_the_padding_of_the_shorter_completion():
    rows = Rows([[1] * 16] * 4, [[[1] * 100, [1] * 20]] * 4)
    shapes = {m.shape for pack in (False, True) for m in in_order(rows, 2, max_shapes=2, pack=pack)}
    assert shapes == {Shape(16, 112), Shape(16, 112, 128)}


def test_many_different_lengths_are_merged_quickly():
    rng = np.random.default_rng(0)
    rows = rows_of(rng.integers(1, 4000, 500))
    assert len({m.shape for m in in_order(rows, 1, max_shapes=4)}) <= 4


def test_rows_in_order_come_once_longest_first():
    order = [row for m in in_order(ROWS, 3, max_shapes=2) for row in m.rows]
    assert order == sorted(range(11), key=lambda i: -len(ROWS.prompts[i]))


def test_batch_holds_the_ids_their_lengths_and_extras():
    rows = Rows([[5, 0, 6], [9]], [[[2], [0, 0]], [[1, 2, 3], []]], {"gap": np.array([0.5, 0.25])})
    batch = batch_of(rows, [1, 0], Shape(4, 3), size=3)
    np.testing.assert_array_equal(batch["prompt_BT"][:2], [[9, 0, 0, 0], [5, 0, 6, 0]])
    np.testing.assert_array_equal(batch["prompt_length_B"][:2], [1, 3])
    np.testing.assert_array_equal(batch["completion_length_BC"][:2], [[3, 0], [1, 2]])
    np.testing.assert_array_equal(batch["completion_BCT"][0], [[1, 2, 3], [0, 0, 0]])
    np.testing.assert_array_equal(batch["mask_B"], [True, True, False])
    np.testing.assert_array_equal(batch["index_B"], [1, 0, 1])
    np.testing.assert_array_equal(batch["gap"][:2], [0.25, 0.5])


@pytest.mark.parametrize("taken", [0, 1, 5, 12])
def test_feed_goes_on_where_its_position_was_saved(taken):
    microbatches = shuffled(ROWS, **OPTIONS)
    assert len(microbatches) == 12
    whole = [arrays["index_B"] for _, arrays in Feed(ROWS, microbatches, 2)]
    feed = Feed(ROWS, microbatches, 2)
    for _ in range(taken):
        next(feed)
    position = json.loads(json.dumps(feed.position))
    resumed = Feed(ROWS, microbatches, 2)
    resumed.position = position
    np.testing.assert_array_equal([arrays["index_B"] for _, arrays in resumed], whole[taken:])


def test_feed_pairs_each_microbatch_with_its_arrays():
    for microbatch, arrays in Feed(ROWS, shuffled(ROWS, **OPTIONS), 2):
        assert tuple(arrays["index_B"][arrays["mask_B"]]) == microbatch.rows
        assert arrays["prompt_BT"].shape == (2, microbatch.shape.prompt)
        assert arrays["completion_BCT"].shape == (2, 2, microbatch.shape.completion)


def test_a_place_in_a_run_that_is_cut_otherwise_is_refused():
    position = Feed(ROWS, shuffled(ROWS, **OPTIONS), 2).position
    other = Feed(ROWS, shuffled(ROWS, **OPTIONS | {"microbatch_rows": 4}), 4)
    with pytest.raises(InputError, match="cut into 12 microbatches and is now cut into 6"):
        other.position = position
