"""The decoder against transformers' torch models, and against itself by other routes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from process_group import on_eight_devices

from dpo4rec_jax.models import llama, rope
from dpo4rec_jax.models.attention import Causal, Shared
from dpo4rec_jax.weights import Policy, load_policy

apply = jax.jit(llama.apply, static_argnums=0)
LENGTH_B = np.array([24, 15])


@pytest.fixture(scope="module")
def tokens_BT() -> np.ndarray:
    return np.random.default_rng(0).integers(0, hf_models.VOCAB, (2, 24))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name -> (torch model, our policy loaded from its checkpoint), each made once."""

    @functools.cache
    def make(name: str) -> tuple[Any, Policy]:
        model = hf_models.make_model(name)
        directory = hf_models.save_model(model, tmp_path_factory.mktemp(name))
        return model, load_policy(directory)

    return make


def our_logits(policy: Policy, tokens_BT: Any, position_BT: Any) -> jax.Array:
    attention = Causal(jnp.full(len(tokens_BT), tokens_BT.shape[1]))
    hidden_BTD, _ = apply(
        policy.config, policy.params, jnp.asarray(tokens_BT), jnp.asarray(position_BT), attention
    )
    return llama.unembed(policy.config, policy.params, hidden_BTD)


@pytest.mark.parametrize("name", hf_models.FAMILY)
def test_logits_equal_hugging_face(name: str, pair: Any, tokens_BT: np.ndarray) -> None:
    model, policy = pair(name)
    expected = hf_models.hf_logits(model, tokens_BT)
    got = np.asarray(policy.logits(tokens_BT, LENGTH_B))
    assert np.abs(expected).max() > 1.0
    for row, length in enumerate(LENGTH_B):
        np.testing.assert_allclose(got[row, :length], expected[row, :length], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama-3.1", "llama-3.2"])
def test_llama3_scaling_on_both_sides_of_position_8192(
    name: str, pair: Any, tokens_BT: np.ndarray
) -> None:
    model, policy = pair(name)
    position_BT = np.stack([np.linspace(8000, 9000, 24, dtype=int), np.arange(8181, 8205)])
    expected = hf_models.hf_logits(model, tokens_BT, position_BT)
    got = our_logits(policy, tokens_BT, position_BT)
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("head_dim", [6, 64, 80, 128])
@pytest.mark.parametrize("theta", [10000.0, 100000.0, 500000.0])
def test_rotary_frequencies_equal_hugging_faces_to_float32_rounding(
    head_dim: int, theta: float
) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = {**hf_models.LLAMA3, "rope_theta": theta}
    theirs = LlamaConfig(head_dim=head_dim, max_position_embeddings=1 << 17, rope_parameters=given)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    ours = rope.frequencies(head_dim, theta, rope.RopeScaling("llama3", 8.0))
    np.testing.assert_allclose(ours, expected.numpy(), rtol=5e-7)


@pytest.mark.parametrize("name", ["llama-3.2", "qwen-2", "qwen-3"])
def test_gradients_equal_torchs(name: str, pair: Any, tokens_BT: np.ndarray) -> None:
    import torch

    model, policy = pair(name)
    model.zero_grad()
    logits = model(torch.tensor(tokens_BT)).logits[:, :-1]
    targets = torch.tensor(tokens_BT[:, 1:])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()

    def loss(params: Any) -> jax.Array:
        position_BT = jnp.broadcast_to(jnp.arange(24), (2, 24))
        attention = Causal(jnp.array([24, 24]))
        hidden_BTD, _ = llama.apply(
            policy.config, params, jnp.asarray(tokens_BT), position_BT, attention, remat="full"
        )
        logp_BTV = jax.nn.log_softmax(llama.unembed(policy.config, params, hidden_BTD))[:, :-1]
        return -jnp.take_along_axis(logp_BTV, jnp.asarray(tokens_BT[:, 1:, None]), -1).mean()

    ours = hf_models.as_hf(policy.config, jax.jit(jax.grad(loss))(policy.params))
    theirs = {name: value.grad.numpy() for name, value in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        assert np.abs(gradient).max() > 0
        np.testing.assert_allclose(
            ours[key], gradient, atol=1e-4 * np.abs(gradient).max(), rtol=0, err_msg=key
        )


def test_only_full_rematerialisation_multiplies_by_the_weights_again(
    pair: Any, tokens_BT: np.ndarray
) -> None:
    _, policy = pair("llama-3")
    config = policy.config

    def flops(remat: llama.Remat) -> float:
        def loss(params: Any) -> jax.Array:
            position_BT = jnp.broadcast_to(jnp.arange(24), (2, 24))
            row = Shared(jnp.full(2, 8), jnp.full((2, 2), 8), 8, 2, 8)
            tokens = jnp.asarray(tokens_BT)
            return llama.apply(config, params, tokens, position_BT, row, remat=remat)[0].sum()

        return jax.jit(jax.grad(loss)).lower(policy.params).compile().cost_analysis()["flops"]

    D, d = config.width, config.head_dim
    weights = 2 * D * d * (config.heads + config.kv_heads) + 3 * D * config.hidden
    once = 2.0 * tokens_BT.size * weights  # a layer's products, forward
    assert flops("dots") < flops("none") + 0.2 * once
    assert flops("full") > flops("none") + 0.8 * once


def test_no_token_sees_a_later_one(pair: Any, tokens_BT: np.ndarray) -> None:
    _, policy = pair("llama-3")

    def logit(embed_VD: jax.Array) -> jax.Array:
        params = {**policy.params, "embed": embed_VD}
        hidden_BTD, _ = llama.apply(
            policy.config,
            params,
            jnp.arange(12)[None],
            jnp.arange(12)[None],
            Causal(jnp.array([12])),
        )
        return hidden_BTD[0, 5].sum()

    gradient_VD = jax.jit(jax.grad(logit))(policy.params["embed"])
    seen = np.abs(gradient_VD).max(axis=1) > 0
    np.testing.assert_array_equal(np.flatnonzero(seen), np.arange(6))


def test_logits_of_a_row_do_not_depend_on_its_padding(pair: Any, tokens_BT: np.ndarray) -> None:
    _, policy = pair("qwen-3")
    other_BT = tokens_BT.copy()
    other_BT[1, 15:] = 3
    a, b = policy.logits(tokens_BT, LENGTH_B), policy.logits(other_BT, LENGTH_B)
    np.testing.assert_array_equal(a[1, :15], b[1, :15])
    alone = policy.logits(tokens_BT[1:, :15], LENGTH_B[1:])
    np.testing.assert_allclose(alone[0], a[1, :15], atol=1e-5, rtol=0)


def test_split_layers_compute_what_the_scan_computes(pair: Any, tokens_BT: np.ndarray) -> None:
    _, policy = pair("mistral")
    position_BT = jnp.broadcast_to(jnp.arange(24), (2, 24))
    args = (jnp.asarray(tokens_BT), position_BT, Causal(jnp.asarray(LENGTH_B), keep_kv=True))
    scanned, stacked = apply(policy.config, policy.params, *args)
    split, caches = apply(policy.config, llama.split_layers(policy.params), *args)
    np.testing.assert_allclose(split, scanned, atol=1e-5, rtol=0)
    assert len(caches) == policy.config.layers
    for layer, cache in enumerate(caches):
        np.testing.assert_allclose(cache["key"], stacked["key"][layer], atol=1e-5, rtol=0)


def test_initial_parameters_have_the_shapes_of_a_checkpoint(pair: Any) -> None:
    for name in ("llama-biased", "qwen-3", "llama-3.2"):
        _, policy = pair(name)
        fresh = jax.eval_shape(functools.partial(llama.init, policy.config), jax.random.key(0))
        assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, policy.params)


ON_EIGHT_DEVICES = r"""
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from dpo4rec_jax.models import llama, rope
from dpo4rec_jax.models.attention import Causal
from dpo4rec_jax.runtime.mesh import BATCH, make_mesh, shardings
config = llama.LlamaConfig(128, 32, 48, 2, 4, 2, 8)
params = llama.init(config, jax.random.key(0))
tokens, lengths = jnp.arange(8 * 10).reshape(8, 10), jnp.arange(3, 11)
def loss(params, tokens, lengths, mesh):
    attention = Causal(lengths)
    position = attention.position_BT(10)
    hidden, _ = llama.apply(config, params, tokens, position, attention, remat="full", mesh=mesh)
    logp = jax.nn.log_softmax(llama.unembed(config, params, hidden))
    return -jnp.take_along_axis(logp[:, :-1], tokens[:, 1:, None], -1).mean()
gradient = jax.jit(jax.value_and_grad(loss), static_argnums=3)
expected = gradient(params, tokens, lengths, None)
for sizes in ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
    mesh = make_mesh(sizes)
    rows = NamedSharding(mesh, BATCH)
    placed = (
        jax.device_put(params, shardings(params, mesh)),
        *jax.device_put((tokens, lengths), rows),
    )
    got = gradient(*placed, mesh)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), got, expected)
    text = gradient.lower(*placed, mesh).compile().as_text()
    moved = re.findall(r"= \(?\w+\[([\d,]*)\]\S* (?:all-reduce|all-gather|all-to-all)\(", text)
    assert len(moved) > 5, moved
    if "tensor" not in sizes:
        # Whatever travels is a parameter or its gradient: no shape with the rows' 10 tokens.
        assert not [shape for shape in moved if "10" in shape.split(",")], moved
"""


def test_mesh_gathers_parameters_and_changes_no_gradient() -> None:
    on_eight_devices(ON_EIGHT_DEVICES)


def test_compute_dtype_and_parameter_dtype_are_apart(
    pair: Any, tokens_BT: np.ndarray, tmp_path: Path
) -> None:
    model, policy = pair("llama-3.2")
    directory = hf_models.save_model(model, tmp_path)
    mixed = load_policy(directory, dtype="bfloat16", param_dtype="float32")
    small = load_policy(directory, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(mixed.params)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(small.params)} == {"bfloat16"}
    exact = policy.logits(tokens_BT, LENGTH_B)
    for rounded in (mixed, small):
        logits = rounded.logits(tokens_BT, LENGTH_B)
        assert logits.dtype == jnp.float32
        assert 1e-4 < np.abs(logits - exact).max() < 0.2
