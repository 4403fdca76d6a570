"""The encoder against Hugging Face's BertModel in torch."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo4rec_jax.models import bert
from dpo4rec_jax.weights.bert import params_from_state

CONFIG = bert.BertConfig(
    vocab_size=97, width=48, hidden=112, layers=3, heads=4, positions=24, norm_eps=1e-12
)


@pytest.fixture(scope="module")
def tokens_and_lengths() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.integers(0, 97, (4, 20), dtype=np.int32), np.array([20, 13, 1, 7], np.int32)


@pytest.fixture(scope="module")
def params() -> dict:
    return bert.init(CONFIG, jax.random.key(1))


def reference(activation: str = "gelu", seed: int = 0):
    """A BertModel in torch whose every parameter, norms and biases too, is random."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=24,
        hidden_act=activation,
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def hidden_of_torch(model, tokens_BT: np.ndarray, length_B: np.ndarray) -> list[np.ndarray]:
    import torch

    mask_BT = np.arange(tokens_BT.shape[1]) < length_B[:, None]
    with torch.no_grad():
        output = model(
            torch.from_numpy(tokens_BT).long(),
            attention_mask=torch.from_numpy(mask_BT).long(),
            output_hidden_states=True,
        )
    return [hidden.numpy() for hidden in output.hidden_states]


def numpy_state(model) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_every_layer_equals_torch_within_1e_5(activation, tokens_and_lengths) -> None:
    model = reference(activation)
    tokens_BT, length_B = tokens_and_lengths
    params = params_from_state(CONFIG, numpy_state(model))
    mask_BT = np.arange(20) < length_B[:, None]
    for depth, expected in enumerate(hidden_of_torch(model, tokens_BT, length_B)):
        config = dataclasses.replace(CONFIG, layers=depth, activation=activation)
        shallow = params | {"layers": jax.tree.map(lambda leaf: leaf[:depth], params["layers"])}  # noqa: B023
        got = bert.apply(config, shallow, jnp.asarray(tokens_BT), jnp.asarray(length_B))
        np.testing.assert_allclose(got[mask_BT], expected[mask_BT], atol=1e-5, rtol=1e-5)


def test_nothing_real_depends_on_padding(params, tokens_and_lengths) -> None:
    tokens_BT, length_B = tokens_and_lengths
    mask_BT = np.arange(20) < length_B[:, None]
    other_BT = np.where(mask_BT, tokens_BT, 5).astype(np.int32)
    got = bert.apply(CONFIG, params, jnp.asarray(tokens_BT), jnp.asarray(length_B))
    again = bert.apply(CONFIG, params, jnp.asarray(other_BT), jnp.asarray(length_B))
    np.testing.assert_array_equal(got[mask_BT], again[mask_BT])
    alone = bert.apply(CONFIG, params, jnp.asarray(tokens_BT[1:2, :13]), jnp.asarray([13]))
    np.testing.assert_allclose(alone[0], got[1, :13], atol=1e-5)


def test_a_row_of_padding_alone_is_finite(params) -> None:
    hidden = bert.apply(CONFIG, params, jnp.zeros((1, 8), jnp.int32), jnp.array([0]))
    assert np.isfinite(hidden).all()


def test_bfloat16_stays_near_float32(params, tokens_and_lengths) -> None:
    tokens_BT, length_B = tokens_and_lengths
    half = dataclasses.replace(CONFIG, dtype="bfloat16")
    full_BTD = bert.apply(CONFIG, params, jnp.asarray(tokens_BT), jnp.asarray(length_B))
    half_BTD = bert.apply(half, params, jnp.asarray(tokens_BT), jnp.asarray(length_B))
    assert half_BTD.dtype == jnp.bfloat16
    mask_BT = np.arange(20) < length_B[:, None]
    error = np.abs(np.asarray(half_BTD, np.float32) - full_BTD)[mask_BT]
    assert error.max() < 0.05  # hidden states are of unit variance; bf16 keeps 8 bits
