"""Adapters: their arithmetic, and the promise that a fresh one changes nothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo4rec_jax.config import LoraConfig
from dpo4rec_jax.models import llama, lora
from dpo4rec_jax.models.attention import Causal

CONFIG = llama.LlamaConfig(31, 16, 24, 2, 4, 2, 6)
LORA = LoraConfig(rank=3, alpha=6.0, targets=["q", "v", "down"])
TOKENS_BT = jnp.arange(10).reshape(2, 5)


@pytest.fixture(scope="module")
def params() -> Any:
    return llama.init(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def adapter() -> Any:
    fresh = lora.init(CONFIG, LORA, jax.random.key(1))
    key = jax.random.key(2)
    return jax.tree.map(lambda leaf: leaf + jax.random.normal(key, leaf.shape) / 4, fresh)


@jax.jit
def hidden(params: Any, adapter: Any = None, lora_key: Any = None) -> Any:
    position_BT = jnp.broadcast_to(jnp.arange(5), (2, 5))
    lora_config = LORA if lora_key is None else LORA.model_copy(update={"dropout": 0.5})
    return llama.apply(
        CONFIG,
        params,
        TOKENS_BT,
        position_BT,
        Causal(jnp.array([5, 5])),
        lora=adapter,
        lora_config=lora_config,
        lora_key=lora_key,
    )[0]


def test_fresh_adapter_changes_nothing_bitwise(params: Any) -> None:
    fresh = lora.init(CONFIG, LORA, jax.random.key(1))
    assert set(fresh["layers"]) == {"q", "v", "down"}
    assert fresh["layers"]["down"]["a"].shape == (2, 24, 3)
    assert fresh["layers"]["v"]["b"].shape == (2, 3, 12)
    assert jnp.std(fresh["layers"]["q"]["a"]) > 0
    np.testing.assert_array_equal(hidden(params, fresh), hidden(params))
    merged = lora.merge(params, fresh, LORA)
    jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_merged_weights_are_kernel_plus_scaled_product(params: Any, adapter: Any) -> None:
    merged = lora.merge(params, adapter, LORA)["layers"]["down"]["kernel"]
    a_LDR, b_LRO = adapter["layers"]["down"]["a"], adapter["layers"]["down"]["b"]
    for layer in range(2):
        update = np.asarray(a_LDR[layer], np.float64) @ np.asarray(b_LRO[layer], np.float64)
        expected = params["layers"]["down"]["kernel"][layer] + 6.0 / 3 * update
        np.testing.assert_allclose(merged[layer], expected, atol=1e-6, rtol=0)


def test_adapted_policy_equals_merged_policy(params: Any, adapter: Any) -> None:
    apart, merged = hidden(params, adapter), hidden(lora.merge(params, adapter, LORA))
    assert np.abs(apart - hidden(params)).max() > 0.1
    np.testing.assert_allclose(apart, merged, atol=1e-5, rtol=0)


def test_merge_keeps_the_dtype_of_the_base(params: Any, adapter: Any) -> None:
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    merged = lora.merge(half, adapter, LORA)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(merged)} == {"bfloat16"}


def test_dropout_follows_its_key_and_rests_without_one(params: Any, adapter: Any) -> None:
    one, two = jax.random.key(3), jax.random.key(4)
    np.testing.assert_array_equal(hidden(params, adapter, one), hidden(params, adapter, one))
    assert np.abs(hidden(params, adapter, one) - hidden(params, adapter, two)).max() > 0.01
    assert np.abs(hidden(params, adapter, one) - hidden(params, adapter)).max() > 0.01


def test_gradient_reaches_b_of_a_fresh_adapter_and_not_its_a(params: Any) -> None:
    fresh = lora.init(CONFIG, LORA, jax.random.key(1))
    gradient = jax.jit(jax.grad(lambda adapter: (hidden(params, adapter) ** 3).sum()))(fresh)
    for leaf in gradient["layers"].values():
        assert np.abs(leaf["b"]).max() > 0
        np.testing.assert_array_equal(leaf["a"], 0.0)
