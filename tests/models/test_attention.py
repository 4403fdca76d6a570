"""Attention strategies against one plain masked softmax over everything."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from process_group import on_eight_devices

from dpo4rec_jax.models import attention, flash
from dpo4rec_jax.models.attention import Causal, Shared
from dpo4rec_jax.models.llama import LlamaConfig

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 6
PROMPT, COMPLETIONS, COMPLETION = 7, 3, 4
TOTAL = PROMPT + COMPLETIONS * COMPLETION
PROMPT_LENGTH_B = np.array([7, 3])
COMPLETION_LENGTH_BC = np.array([[4, 2, 1], [3, 4, 0]])


def random_qkv(tokens: int, head_dim: int = HEAD_DIM, seed: int = 0) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(seed), 3)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return tuple(
        jax.random.normal(key, (2, tokens, num, head_dim))
        for key, num in zip(keys, heads, strict=True)
    )


@functools.partial(jax.jit, static_argnames="window")
def run(strategy: Any, *qkv: jax.Array, window: int | None = None) -> jax.Array:
    tokens = () if isinstance(strategy, Shared) else qkv[0].shape[1:2]
    return strategy(*qkv, strategy.position_BT(*tokens), None, window)[0]


def plain(query: Any, key: Any, value: Any, mask_TT: np.ndarray) -> np.ndarray:
    """One row [T, heads, d]: softmax(q k / sqrt(d)) v in float64, head by head."""
    group = query.shape[1] // key.shape[1]
    out = np.zeros(query.shape)
    for head in range(query.shape[1]):
        q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
        q, k, v = q[:, head], k[:, head // group], v[:, head // group]
        score = np.where(mask_TT, q @ k.T / np.sqrt(q.shape[1]), -np.inf)
        weight = np.exp(score - score.max(axis=1, keepdims=True))
        out[:, head] = weight / weight.sum(axis=1, keepdims=True) @ v
    return out


def shared(**changes: Any) -> Shared:
    fields = {
        "prompt_length_B": jnp.asarray(PROMPT_LENGTH_B),
        "completion_length_BC": jnp.asarray(COMPLETION_LENGTH_BC),
        "prompt_tokens": PROMPT,
        "completions": COMPLETIONS,
        "completion_tokens": COMPLETION,
    }
    return Shared(**{**fields, **changes})


def packed_indices(row: int, completion: int) -> np.ndarray:
    """Where [valid prompt | valid completion] lies in the packed row."""
    start = PROMPT + completion * COMPLETION
    length = COMPLETION_LENGTH_BC[row, completion]
    return np.concatenate([np.arange(PROMPT_LENGTH_B[row]), np.arange(start, start + length)])


@pytest.mark.parametrize("window", [None, 3, 100])
def test_causal_equals_a_masked_softmax(window: int | None) -> None:
    query, key, value = random_qkv(9)
    strategy = Causal(jnp.array([9, 5]), keep_kv=True)
    out, kept = strategy(query, key, value, strategy.position_BT(9), None, window)
    behind = np.arange(9)[:, None] - np.arange(9)
    mask_TT = (behind >= 0) & (behind < (window or 9))
    for row in range(2):
        expected = plain(query[row], key[row], value[row], mask_TT)
        np.testing.assert_allclose(out[row], expected, atol=1e-6, rtol=0)
    np.testing.assert_array_equal(kept["key"], key)
    np.testing.assert_array_equal(kept["value"], value)


@pytest.mark.parametrize("window", [None, 3])
def test_shared_equals_separate_rows(window: int | None) -> None:
    query, key, value = random_qkv(TOTAL)
    out = run(shared(), query, key, value, window=window)
    for row in range(2):
        for completion in range(COMPLETIONS):
            index = packed_indices(row, completion)
            behind = np.arange(len(index))[:, None] - np.arange(len(index))
            mask_TT = (behind >= 0) & (behind < (window or TOTAL))
            expected = plain(query[row, index], key[row, index], value[row, index], mask_TT)
            np.testing.assert_allclose(out[row, index], expected, atol=1e-6, rtol=0)


def test_positions_of_completions_continue_where_the_prompt_ends() -> None:
    expected = [
        [*range(7), *[7, 8, 9, 10] * 3],
        [*range(7), *[3, 4, 5, 6] * 3],
    ]
    np.testing.assert_array_equal(shared().position_BT(), expected)


def test_gradients_of_shared_sum_those_of_separate_rows() -> None:
    query, key, value = random_qkv(TOTAL)
    weight = jax.random.normal(jax.random.key(9), query.shape)

    def packed(*qkv: jax.Array) -> jax.Array:
        out = run(shared(), *qkv)[0]
        rows = [packed_indices(0, completion) for completion in range(COMPLETIONS)]
        return sum((out[i] * weight[0, i]).sum() for i in rows)

    def separate(*qkv: jax.Array) -> jax.Array:
        width = PROMPT + COMPLETION
        rows = [packed_indices(0, completion) for completion in range(COMPLETIONS)]
        index = np.stack([np.pad(i, (0, width - len(i))) for i in rows])
        real = np.stack([np.arange(width) < len(i) for i in rows])[..., None, None]
        strategy = Causal(jnp.array([len(i) for i in rows]))
        out = run(strategy, *(x[0][index] for x in qkv))
        return (out * weight[0][index] * real).sum()

    ours = jax.jit(jax.grad(packed, argnums=(0, 1, 2)))(query, key, value)
    expected = jax.jit(jax.grad(separate, argnums=(0, 1, 2)))(query, key, value)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)


def test_nothing_leaks_between_completions_or_out_of_padding() -> None:
    query, key, value = random_qkv(TOTAL)
    other = random_qkv(TOTAL, seed=5)
    for row in range(2):
        keep = packed_indices(row, 1)
        mixed = [
            new.at[row, keep].set(old[row, keep])
            for new, old in zip(other, (query, key, value), strict=True)
        ]
        before, after = run(shared(), query, key, value), run(shared(), *mixed)
        np.testing.assert_array_equal(before[row, keep], after[row, keep])


def equations(jaxpr: Any) -> Iterator[Any]:
    """Those of the functions that it calls, too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_scores_between_completions_are_not_computed() -> None:
    strategy = shared()
    qkv = random_qkv(TOTAL)
    jaxpr = jax.make_jaxpr(lambda q, k, v: strategy(q, k, v, strategy.position_BT())[0])(*qkv)
    scores = 0
    for equation in equations(jaxpr.jaxpr):
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            shape = equation.invars[0].aval.shape
            if np.prod([shape[axis] for axis in contracted]) == HEAD_DIM:
                scores += equation.outvars[0].aval.size
    blocks = PROMPT**2 + COMPLETIONS * COMPLETION * (PROMPT + COMPLETION)
    assert scores == 2 * HEADS * blocks


def test_rows_that_see_nothing_are_finite_and_so_are_their_gradients() -> None:
    qkv = random_qkv(TOTAL)
    nothing = shared(
        prompt_length_B=jnp.array([0, 0]), completion_length_BC=jnp.zeros((2, COMPLETIONS), int)
    )

    total = jax.jit(jax.grad(lambda *qkv: run(nothing, *qkv).sum(), argnums=(0, 1, 2)))
    assert all(jnp.isfinite(gradient).all() for gradient in total(*qkv))
    block = attention.attend(*qkv, jnp.zeros((2, 1, 1), bool))
    np.testing.assert_array_equal(attention.merge(block, block), 0.0)


def test_splitting_the_keys_does_not_change_the_softmax() -> None:
    query, key, value = random_qkv(8)
    mask = jnp.ones((1, 8, 8), bool)

    def attended(*spans: slice) -> jax.Array:
        blocks = [
            attention.attend(query, key[:, span], value[:, span], mask[:, :, span])
            for span in spans
        ]
        return attention.merge(*blocks)

    parts = jax.jit(lambda: attended(slice(0, 3), slice(3, 4), slice(4, 8)))()
    whole = jax.jit(lambda: attended(slice(0, 8)))()
    np.testing.assert_allclose(parts, whole, atol=1e-6, rtol=0)


@pytest.fixture
def cudnn_by_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call to jax.nn, computed by its reference: checks how we put the question."""
    original = jax.nn.dot_product_attention

    def reference(*args: Any, implementation: str, **kwargs: Any) -> jax.Array:
        assert implementation == "cudnn"
        with jax.default_matmul_precision("highest"):
            return original(*args, **kwargs, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", reference)


@pytest.mark.parametrize("window", [None, 3])
def test_cudnn_is_asked_for_the_same_attention(window: int | None, cudnn_by_xla: None) -> None:
    qkv = random_qkv(TOTAL)
    for strategy in (Causal(jnp.array([TOTAL, 5])), shared()):
        ours = run(strategy, *qkv, window=window)
        theirs = run(strategy.replace(implementation="cudnn"), *qkv, window=window)
        np.testing.assert_allclose(theirs, ours, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 17])
def test_splash_interpreted_equals_xla_with_gradients(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "splash", functools.partial(flash.splash, interpret=True))
    prompt, completion = 100, 60
    total = prompt + 2 * completion
    strategy = shared(
        prompt_length_B=jnp.array([70, 100]),
        completion_length_BC=jnp.array([[60, 60], [60, 50]]),
        prompt_tokens=prompt,
        completions=2,
        completion_tokens=completion,
    )
    qkv = random_qkv(total, head_dim=64)
    index = np.arange(total)
    real_BT = (index[None] >= prompt) | (index[None] < np.array([[70], [100]]))
    weight = jax.random.normal(jax.random.key(9), qkv[0].shape) * real_BT[:, :, None, None]

    def loss(implementation: str, *qkv: jax.Array) -> jax.Array:
        causal = Causal(jnp.array([total, total]))
        out = sum(
            run(chosen.replace(implementation=implementation), *qkv, window=window)
            for chosen in (strategy, causal)
        )
        return (out * weight).sum()

    grad = jax.jit(jax.value_and_grad(loss, argnums=(1, 2, 3)), static_argnums=0)
    (ours, ours_grad), (theirs, theirs_grad) = grad("xla", *qkv), grad("splash", *qkv)
    np.testing.assert_allclose(theirs, ours, rtol=1e-5)
    for a, b in zip(theirs_grad, ours_grad, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=0)


ON_EIGHT_DEVICES = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from dpo4rec_jax.models import flash
from dpo4rec_jax.models.attention import Shared
flash.splash = functools.partial(flash.splash, interpret=True)
mesh = jax.make_mesh(
    (2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
)
keys = jax.random.split(jax.random.key(0), 3)
qkv = [jax.random.normal(k, (4, 128, n, 64)) for k, n in zip(keys, (4, 2, 2))]
lengths = jnp.array([64, 50, 30, 1]), jnp.full((4, 2), 32)
def run(qkv, lengths, implementation, mesh):
    strategy = Shared(*lengths, 64, 2, 32, implementation, mesh)
    return strategy(*qkv, strategy.position_BT())[0]
run = jax.jit(run, static_argnums=(2, 3))
expected = run(qkv, lengths, "xla", None)
heads = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
got = run(jax.device_put(qkv, heads), lengths, "splash", mesh)
real = (jnp.arange(128) >= 64) | (jnp.arange(128) < lengths[0][:, None])
np.testing.assert_allclose(*(np.asarray(x)[np.asarray(real)] for x in (got, expected)), atol=1e-5)
assert got.sharding.is_equivalent_to(heads, 4), got.sharding
"""


@pytest.mark.slow
def test_splash_on_a_mesh_computes_each_devices_own_rows_and_heads() -> None:
    on_eight_devices(ON_EIGHT_DEVICES)


CONFIG = LlamaConfig(97, 48, 80, 2, 4, 2, 64, dtype="bfloat16")


@pytest.mark.parametrize(
    ("requested", "backend", "changes", "expected", "says"),
    [
        ("auto", "cpu", {}, "xla", "attention: xla"),
        ("auto", "gpu", {}, "cudnn", "attention: cudnn"),
        ("auto", "tpu", {}, "splash", "attention: splash"),
        ("xla", "gpu", {}, "xla", "attention: xla"),
        ("cudnn", "cpu", {}, "xla", "xla instead of cudnn: it needs a gpu, this is cpu"),
        ("splash", "gpu", {}, "xla", "xla instead of splash: it needs a tpu, this is gpu"),
        ("auto", "gpu", {"dtype": "float32"}, "xla", "computes in bfloat16"),
        ("cudnn", "gpu", {"head_dim": 10}, "xla", "a multiple of 8, got 10"),
        ("splash", "tpu", {"head_dim": 80}, "xla", "a multiple of 64, got 80"),
    ],
)
def test_choice_of_kernel_is_logged_in_one_line(
    requested: str,
    backend: str,
    changes: dict[str, Any],
    expected: str,
    says: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    with caplog.at_level(logging.INFO):
        assert attention.choose(requested, config, backend) == expected
    assert len(caplog.messages) == 1
    assert says in caplog.messages[0]
