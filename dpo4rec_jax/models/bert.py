"""BERT as an encoder of texts (Devlin et al. 2018, arXiv 1810.04805), exact to Hugging Face's.

Post-layer-norm blocks, learned positions, token type 0 throughout, no pooler. The layers are
scanned: their parameters are stacked on axis 0, query, key and value in one projection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
}


@dataclass(frozen=True)
class BertConfig:
    """Sizes of the encoder; `dtype` is the compute dtype, norms and softmax stay in float32."""

    vocab_size: int
    width: int
    hidden: int
    layers: int
    heads: int
    positions: int
    token_types: int = 2
    norm_eps: float = 1e-12
    activation: Literal["gelu", "gelu_new", "relu"] = "gelu"
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def precision(self) -> jax.lax.Precision | None:
        """float32 compute means float32: accelerators would otherwise multiply in TF32 or bf16."""
        return jax.lax.Precision.HIGHEST if self.dtype == "float32" else None


def init(config: BertConfig, key: jax.Array) -> dict[str, Any]:
    """Random float32 parameters: matrices normal(0, 0.02) as BERT's, norms at identity."""
    tokens_BT, length_B = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
    return dict(Bert(config).init(key, tokens_BT, length_B)["params"])


def apply(
    config: BertConfig,
    params: dict[str, Any],
    tokens_BT: Int[Array, "B T"],
    length_B: Int[Array, " B"],
) -> Float[Array, "B T D"]:
    """Hidden states after the last layer of right-padded rows, of which `length_B` are real.

    What stands at padded positions is finite and means nothing; nothing real depends on it.
    """
    hidden_BTD = Bert(config).apply({"params": params}, tokens_BT, length_B)
    assert isinstance(hidden_BTD, jax.Array)
    return hidden_BTD


class Bert(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(
        self, tokens_BT: Int[Array, "B T"], length_B: Int[Array, " B"]
    ) -> Float[Array, "B T D"]:
        config = self.config
        token_VD = self.param("token", _normal, (config.vocab_size, config.width))
        position_TD = self.param("position", _normal, (config.positions, config.width))
        type_KD = self.param("token_type", _normal, (config.token_types, config.width))
        place_1TD = (position_TD[: tokens_BT.shape[1]] + type_KD[:1])[None]
        x_BTD = jnp.take(token_VD, tokens_BT, axis=0) + place_1TD
        x_BTD = _norm(config, "norm")(x_BTD).astype(config.dtype)
        layers = nn.scan(
            BertLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast,),  # pyright: ignore[reportArgumentType]
            length=config.layers,
        )
        x_BTD, _ = layers(config, name="layers")(x_BTD, length_B)
        return x_BTD


class BertLayer(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], length_B: Int[Array, " B"]
    ) -> tuple[Float[Array, "B T D"], None]:
        config = self.config
        qkv_BTE = self._dense("qkv", 3 * config.width)(x_BTD)
        split = (*x_BTD.shape[:2], config.heads, config.width // config.heads)
        query, key, value = (part.reshape(split) for part in jnp.split(qkv_BTE, 3, axis=-1))
        mixed_BTHd = _attend(query, key, value, length_B, config.precision)
        mixed_BTD = self._dense("out", config.width)(mixed_BTHd.reshape(x_BTD.shape))
        x_BTD = _norm(config, "attention_norm")(x_BTD + mixed_BTD).astype(config.dtype)
        inner = ACTIVATIONS[config.activation](self._dense("up", config.hidden)(x_BTD))
        x_BTD = x_BTD + self._dense("down", config.width)(inner)
        return _norm(config, "mlp_norm")(x_BTD).astype(config.dtype), None

    def _dense(self, name: str, features: int) -> nn.Dense:
        config = self.config
        return nn.Dense(
            features,
            dtype=config.dtype,
            precision=config.precision,
            kernel_init=_normal,
            name=name,
        )


_normal = nn.initializers.normal(0.02)


def _norm(config: BertConfig, name: str) -> nn.LayerNorm:
    # use_fast_variance loses digits to E[x^2] - E[x]^2; the epsilon of 1e-12 does not forgive it.
    return nn.LayerNorm(config.norm_eps, dtype=jnp.float32, use_fast_variance=False, name=name)


def _attend(
    query_BTHd: Float[Array, "B T H d"],
    key_BTHd: Float[Array, "B T H d"],
    value_BTHd: Float[Array, "B T H d"],
    length_B: Int[Array, " B"],
    precision: jax.lax.Precision | None,
) -> Float[Array, "B T H d"]:
    # Heads first and the division last: alone, on CPU, this form takes a third of the time of
    # jax.nn.dot_product_attention, which is 40 % of a layer there.
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query_BTHd, key_BTHd, value_BTHd))
    mask_BT = jnp.arange(key.shape[2])[None] < length_B[:, None]
    score_BHTT = jnp.einsum(
        "bhqd,bhkd->bhqk", query, key, precision=precision, preferred_element_type=jnp.float32
    )
    score_BHTT = jnp.where(mask_BT[:, None, None], score_BHTT / math.sqrt(query.shape[-1]), -1e30)
    weight_BHTT = jnp.exp(score_BHTT - score_BHTT.max(-1, keepdims=True))
    mixed_BHTd = jnp.einsum(
        "bhqk,bhkd->bhqd", weight_BHTT.astype(value.dtype), value, precision=precision
    )
    mixed_BHTd = mixed_BHTd / weight_BHTT.sum(-1, keepdims=True).astype(value.dtype)
    return jnp.swapaxes(mixed_BHTd, 1, 2)
