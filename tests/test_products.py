"""Products in bfloat16 as CPUs compute them, and what else is there to keep them fast."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo4rec_jax.models import llama, rope
from dpo4rec_jax.models.attention import Causal
from dpo4rec_jax.models.llama import LlamaConfig
from dpo4rec_jax.products import FEW, product, summed, times_rows
from dpo4rec_jax.sampling import cache

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="how XLA compiles for CPUs")
cpu_info = Path("/proc/cpuinfo")
with_units = pytest.mark.skipif(
    not cpu_info.exists() or "amx_bf16" not in cpu_info.read_text(),
    reason="without bfloat16 units XLA for CPUs multiplies as float32",
)
CONFIG = LlamaConfig(97, 64, 96, 2, 4, 2, 16, tied=True)
X, KERNEL = (2, 3, 64), (64, 96)
SPECS = [
    ("...d,do->...o", X, KERNEL),
    ("...d,od->...o", X, KERNEL[::-1]),
    ("...o,do->...d", (2, 3, 96), KERNEL),
    ("...d,...o->do", X, (2, 3, 96)),
]


def drawn(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def compiled(config: LlamaConfig, params: dict) -> str:
    """The HLO of four rows' next-token logits."""

    def logits_BV(params, tokens_BT):
        attention = Causal(jnp.full(4, 8))
        hidden_BTD, _ = llama.apply(config, params, tokens_BT, attention.position_BT(8), attention)
        return llama.unembed(config, params, hidden_BTD[:, -1])

    return jax.jit(logits_BV).lower(params, jnp.zeros((4, 8), jnp.int32)).compile().as_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [X, (FEW, 64), (FEW + 1, 64)], ids=str)
def test_times_rows_is_the_product_whichever_factor_stands_left(shape: tuple, dtype: str) -> None:
    x, *matrices = (drawn(seed, s, dtype) for seed, s in enumerate((shape, (96, 64), (5, 64))))
    for form in (product, summed):
        formed = times_rows(x, *matrices, form=form)
        expected = tuple(form("...d,od->...o", x, matrix) for matrix in matrices)
        chex.assert_trees_all_equal_shapes_and_dtypes(formed, expected)
        chex.assert_trees_all_close(formed, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", SPECS, ids=lambda case: case[0])
def test_a_product_is_summed_in_float32_and_rounded_once(case: tuple, dtype: str) -> None:
    spec, *shapes = case
    left, right = (drawn(seed, shape, dtype) for seed, shape in enumerate(shapes))
    exact = np.einsum(
        spec.replace("...", "ab"), *(np.asarray(x, np.float64) for x in (left, right))
    )
    assert summed(spec, left, right).dtype == jnp.float32
    np.testing.assert_allclose(summed(spec, left, right), exact, atol=2e-5)
    out = product(spec, left, right)
    assert out.dtype == dtype
    rounding = {"float32": 1e-6, "bfloat16": 2.0**-8}[dtype]
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=rounding, atol=2e-5)


@on_cpu
@with_units
@pytest.mark.parametrize("split", [False, True])
def test_bfloat16_weights_are_multiplied_as_they_are(split: bool) -> None:
    """No product of weights has float32 factors, so no weight is converted a step."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="bfloat16")
    params = llama.init(config, jax.random.key(0))
    params = llama.split_layers(params) if split else params

    hlo = compiled(config, params)
    shape = dict(re.findall(r"%([\w.-]+) = (\w+\[[\d,]*\])", hlo))
    factors = [
        shape[name] for pair in re.findall(r" dot\(%([\w.-]+), %([\w.-]+)\)", hlo) for name in pair
    ]
    weights = [one for one in factors if re.search(r"\[(64,96|96,64|97,64|64,97)\]", one)]
    assert weights
    assert all(one.startswith("bf16") for one in weights), weights


@pytest.mark.parametrize("axis", [2, 3])
def test_a_token_joins_its_row_in_either_dtype(axis: int) -> None:
    """bfloat16 is selected on CPU, float32 scattered; a row that is full keeps what it has."""
    held, new = drawn(0, (4, 2, 6, 6), "bfloat16"), drawn(1, (4, 2, 6), "bfloat16")
    length_B = jnp.array([0, 5, 6, 2])
    append = cache._append_value if axis == 2 else cache._append_key
    expected = np.array(held.astype(jnp.float32))
    for row, at in enumerate(length_B):
        if at < 6:
            expected[(row, slice(None), *([at] if axis == 2 else [slice(None), at]))] = new[row]
    for dtype in ("bfloat16", "float32"):
        got = append(held.astype(dtype), new.astype(dtype), length_B)
        assert got.dtype == dtype
        np.testing.assert_array_equal(np.asarray(got, np.float32), expected)


@on_cpu
def test_cosines_are_taken_once_for_all_layers() -> None:
    position_BT = np.arange(24).reshape(2, 12)
    frequency_d = rope.frequencies(16, 10000.0, None)
    angle_BTd = position_BT[..., None] * frequency_d
    turns = rope.turns(jnp.asarray(position_BT), frequency_d)
    np.testing.assert_allclose(turns[0], np.cos(angle_BTd), atol=1e-6)
    np.testing.assert_allclose(turns[1], np.sin(angle_BTd), atol=1e-6)

    params = llama.split_layers(llama.init(CONFIG, jax.random.key(0)))
    hlo = compiled(CONFIG, params)
    assert hlo.count(" cosine(") == hlo.count(" sine(") == 1
