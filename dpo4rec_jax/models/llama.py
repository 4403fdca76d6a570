"""Llama-style decoders in Flax: Llama 2/3.x, SmolLM2, Mistral, Qwen2/2.5/3 by flags of one config.

Pure functions outside, linen inside. Parameters are nested dicts whose layers are stacked on a
leading axis L and scanned over, so a program compiles one layer whatever the depth:

    embed [V, D], final_norm [D], unembed [D, V] (absent when tied), layers:
      attention_norm, mlp_norm [L, D]; q_norm, k_norm [L, d] (Qwen3)
      q, k, v, o, gate, up, down: {kernel [L, in, out], bias [L, out] (Qwen2: q, k, v)}

How tokens see each other is a strategy handed in from outside (`Attention`): the layer projects
and rotates, the strategy attends and keeps what it wants in its cache.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from dpo4rec_jax.config import LoraConfig
from dpo4rec_jax.models import rope, tiles
from dpo4rec_jax.models.projections import (
    INIT_DEVIATION,
    PRODUCT,
    Projection,
    products,
)
from dpo4rec_jax.models.rope import RopeScaling
from dpo4rec_jax.models.row_sums import row_sums
from dpo4rec_jax.products import summed, times_rows

Params = Mapping[str, Any]

ROWS = ("data", "fsdp")  # mesh axes that split a batch
Remat = Literal["full", "dots", "none"]
DTypeName = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The architecture, and the dtypes it is held and computed in."""

    vocab_size: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_eps: float = 1e-5
    tied: bool = False
    attention_bias: bool = False  # on q, k and v
    output_bias: bool = False  # on o
    qk_norm: bool = False
    sliding_window: int | None = None  # a token sees itself and so many - 1 before it
    max_position: int = 1 << 20
    dtype: DTypeName = "float32"  # of activations and matrix products
    param_dtype: DTypeName = "float32"


@runtime_checkable
class Attention(Protocol):
    """How tokens see each other, the same object for all layers; a pytree, so it may hold arrays.

    q and k come rotated. `cache_layer` is this layer's slice of the cache (None without one) and
    the returned one takes its place; `window` is the config's sliding window.
    """

    def __call__(
        self,
        query_BTHd: Float[Array, "B T H d"],
        key_BTKd: Float[Array, "B T K d"],
        value_BTKd: Float[Array, "B T K d"],
        position_BT: Int[Array, "B T"],
        cache_layer: Any,
        window: int | None = None,
    ) -> tuple[Float[Array, "B T H d"], Any]: ...


def lay(x: Array, mesh: Mesh | None, *axes: Any) -> Array:
    """The array laid out on the mesh by axes of its first dimensions, the others whole.

    Left to itself XLA's partitioner takes parameters split over `fsdp` for a split of the width
    and sums activations between devices, where the parameters should be gathered.
    """
    if mesh is None:
        return x
    for size, names in zip(x.shape, axes, strict=False):
        names = names if isinstance(names, tuple) else (names,) * (names is not None)
        if size % math.prod(mesh.shape[name] for name in names):
            return x  # an odd batch: the partitioner's choice
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))


def rms_norm(x_xD: Array, scale_D: Array, eps: float) -> Array:
    """Normalised in float32, cast back, then scaled: HF's order, which bf16 parity hangs on."""
    normed_xD: Any = _normalised(eps, x_xD)
    return normed_xD * jnp.broadcast_to(scale_D.astype(x_xD.dtype), x_xD.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalised(eps: float, x_xD: Array) -> Array:
    return _normalised_forward(eps, x_xD)[0]


def _normalised_forward(eps: float, x_xD: Array) -> tuple[Array, tuple[Array, Array]]:
    x32_xD = x_xD.astype(jnp.float32)
    inverse_x1 = jax.lax.rsqrt(row_sums(x32_xD * x32_xD) / x_xD.shape[-1] + eps)
    return (x32_xD * inverse_x1).astype(x_xD.dtype), (x_xD, inverse_x1)


def _normalised_backward(
    eps: float, kept: tuple[Array, Array], by_normed_xD: Array
) -> tuple[Array]:
    x_xD, inverse_x1 = kept
    normed_xD = x_xD.astype(jnp.float32) * inverse_x1
    by_normed_xD = by_normed_xD.astype(jnp.float32)
    along_x1 = row_sums(by_normed_xD * normed_xD) / x_xD.shape[-1]
    return ((inverse_x1 * (by_normed_xD - normed_xD * along_x1)).astype(x_xD.dtype),)


_normalised.defvjp(_normalised_forward, _normalised_backward)


class Layer(nn.Module):
    config: LlamaConfig
    lora_config: LoraConfig | None = None
    dropout: bool = False
    mesh: Mesh | None = None
    by_row: bool = False

    @nn.compact
    def __call__(
        self, x_BTD: Array, cache: Any, lora: Params | None, shared: tuple[Any, ...]
    ) -> tuple[Array, Any]:
        """`shared` is (attention, position_BT, cos_BTd, sin_BTd), the same for every layer."""
        attention, position_BT, cos_BTd, sin_BTd = shared
        config, (B, T) = self.config, x_BTD.shape[:2]
        d = config.head_dim

        normed_BTD = self._norm("attention_norm", x_BTD)
        features = {"q": config.heads * d, "k": config.kv_heads * d, "v": config.kv_heads * d}
        query, key, value = self._project(features, normed_BTD, lora, config.attention_bias)
        query_BTHd = query.reshape(B, T, config.heads, d)
        key_BTKd = key.reshape(B, T, config.kv_heads, d)
        if config.qk_norm:
            query_BTHd = self._norm("q_norm", query_BTHd)
            key_BTKd = self._norm("k_norm", key_BTKd)
        attended_BTHd, cache = attention(
            rope.rotate(query_BTHd, cos_BTd, sin_BTd),
            rope.rotate(key_BTKd, cos_BTd, sin_BTd),
            value.reshape(B, T, config.kv_heads, d),
            position_BT,
            cache,
            config.sliding_window,
        )
        attended_BTO = attended_BTHd.reshape(B, T, config.heads * d)
        (out_BTD,) = self._project({"o": config.width}, attended_BTO, lora, config.output_bias)
        x_BTD = lay(x_BTD + out_BTD, self.mesh, ROWS)

        normed_BTD = self._norm("mlp_norm", x_BTD)
        gate, up = self._project({"gate": config.hidden, "up": config.hidden}, normed_BTD, lora)
        (out_BTD,) = self._project({"down": config.width}, nn.silu(gate) * up, lora)
        return lay(x_BTD + out_BTD, self.mesh, ROWS), cache

    def _norm(self, name: str, x_xD: Array) -> Array:
        shape = x_xD.shape[-1:]
        scale_D = self.param(name, nn.initializers.ones, shape, self.config.param_dtype)
        return rms_norm(x_xD, scale_D, self.config.rms_eps)

    def _project(
        self, features: dict[str, int], x_BTD: Array, lora: Params | None, bias: bool = False
    ) -> list[Array]:
        """Projections of one input, by name and width."""
        settings = (bias, self.by_row, self.lora_config, self.dropout)
        projections = [
            Projection(self.config, (x_BTD.shape[-1], width), *settings, name=name)
            for name, width in features.items()
        ]
        with jax.named_scope("_".join(features)):
            formed = products(projections, x_BTD, self.mesh)
        adapters = [None if lora is None else lora.get(name) for name in features]
        each = zip(projections, formed, adapters, strict=True)
        return [projection(x_BTD, y_BTO, adapter) for projection, y_BTO, adapter in each]


class Decoder(nn.Module):
    config: LlamaConfig
    lora_config: LoraConfig | None = None
    dropout: bool = False
    mesh: Mesh | None = None
    remat: Remat = "none"
    split: bool = False

    @nn.compact
    def __call__(
        self,
        tokens_BT: Array,
        position_BT: Array,
        attention: Attention,
        cache: Any,
        lora: Params | None,
    ) -> tuple[Array, Any]:
        config = self.config
        shape_VD = (config.vocab_size, config.width)
        normal = nn.initializers.normal(INIT_DEVIATION)
        embed_VD = self.param("embed", normal, shape_VD, config.param_dtype)
        if not config.tied:
            self.param("unembed", normal, shape_VD[::-1], config.param_dtype)
        table_VD = lay(embed_VD, self.mesh, "tensor")
        x_BTD = lay(jnp.take(table_VD, tokens_BT, axis=0).astype(config.dtype), self.mesh, ROWS)
        frequency_d = rope.frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        shared = (attention, position_BT, *rope.turns(position_BT, frequency_d))
        layers = self._run_split if self.split else self._run_scanned
        x_BTD, cache = layers(x_BTD, cache, None if lora is None else lora["layers"], shared)
        scale_D = self.param("final_norm", nn.initializers.ones, shape_VD[1:], config.param_dtype)
        return rms_norm(x_BTD, scale_D, config.rms_eps), cache

    def _layer(self) -> Any:
        layer = Layer if self.remat == "none" else self._rematerialised()
        settings = (self.config, self.lora_config, self.dropout, self.mesh, self.split)
        return functools.partial(layer, *settings)

    def _rematerialised(self) -> Any:
        # By name: a policy for products does not see into a function with a gradient of its own.
        kept = jax.checkpoint_policies.save_only_these_names(PRODUCT, tiles.KEPT)
        policy = kept if self.remat == "dots" else None
        return nn.remat(Layer, prevent_cse=False, policy=policy)

    def _run_scanned(self, x_BTD: Array, cache: Any, lora: Any, shared: Any) -> tuple[Array, Any]:
        layer = self._layer()
        scanned = nn.scan(
            layer.func,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, 0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=self.config.layers,
        )
        return scanned(*layer.args, name="layers")(x_BTD, cache, lora, shared)

    def _run_split(self, x_BTD: Array, cache: Any, lora: Any, shared: Any) -> tuple[Array, Any]:
        caches = []
        for index in range(self.config.layers):
            adapter = jax.tree.map(lambda leaf: leaf[index], lora)  # noqa: B023
            layer = self._layer()(name=f"layer_{index}")
            x_BTD, layer_cache = layer(
                x_BTD, None if cache is None else cache[index], adapter, shared
            )
            caches.append(layer_cache)
        return x_BTD, tuple(caches)


@functools.partial(jax.jit, static_argnums=0)
def init(config: LlamaConfig, key: Array) -> dict[str, Any]:
    """Random parameters (normal, 0.02; norms one) in `config.param_dtype`."""
    token_11 = jnp.zeros((1, 1), jnp.int32)
    variables = Decoder(config).init(key, token_11, token_11, _attend_self, None, None)
    return dict(variables["params"])


def _attend_self(query, key, value, position, cache_layer, window=None):
    return query, None


def apply(
    config: LlamaConfig,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    position_BT: Int[Array, "B T"],
    attention: Attention,
    cache: Any = None,
    *,
    lora: Params | None = None,
    lora_config: LoraConfig | None = None,
    lora_key: Array | None = None,
    remat: Remat = "none",
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B T D"], Any]:
    """Hidden states after the final norm, in the compute dtype, and the new cache.

    The cache is whatever the attention strategy keeps, with a leading layer axis. After
    `split_layers` the layers run one by one instead, and the cache is a tuple of one entry a layer.
    `lora_key` turns the adapters' dropout on. The backward pass recomputes every activation of a
    layer (`remat` "full"), all but its projections' products ("dots": attention and what is
    elementwise cost little to recompute and much to keep), or nothing. `mesh` is what the
    parameters lie on (axes data, fsdp, tensor): rows are split by the first two.
    """
    rngs = {} if lora_key is None else {"dropout": lora_key}
    split = "layers" not in params
    decoder = Decoder(config, lora_config, bool(rngs), mesh, remat, split)
    return decoder.apply(
        {"params": params}, tokens_BT, position_BT, attention, cache, lora, rngs=rngs
    )


def split_layers(params: Params) -> dict[str, Any]:
    """The same parameters with one dict a layer (`layer_0` ...) in place of the stacks, and each
    `kernel` [in, out] as `kernel_rows` [out, in].

    For decoding: a scan that consumes and returns a cache copies all of it each token, and on CPU
    copies every weight out of its stack as well; few rows of x times a matrix are a sixth faster
    there where its rows are what x is multiplied by. Costs one copy now and a longer compilation.
    """
    layers = params["layers"]
    split = {name: value for name, value in params.items() if name != "layers"}
    for index in range(len(layers["attention_norm"])):
        split[f"layer_{index}"] = _one_layer(layers, index)
    return split


@jax.jit
def _one_layer(layers: Params, index: Int[Array, ""]) -> dict[str, Any]:
    """A layer's norms, and projections by rows, each leaf written once."""
    layer = jax.tree.map(lambda stack: stack[index], layers)
    return {
        name: _by_rows(part) if isinstance(part, Mapping) else part for name, part in layer.items()
    }


def _by_rows(projection: Params) -> dict[str, Any]:
    rest = {name: leaf for name, leaf in projection.items() if name != "kernel"}
    return rest | {"kernel_rows": projection["kernel"].T}


def unembedding(config: LlamaConfig, params: Params) -> Float[Array, "D V"]:
    """What turns hidden states into logits; with tied weights the embedding, transposed."""
    return params["embed"].T if config.tied else params["unembed"]


def unembed(
    config: LlamaConfig, params: Params, hidden_xD: Float[Array, "*x D"]
) -> Float[Array, "*x V"]:
    """Logits, accumulated and returned in float32 whatever the compute dtype."""
    dtype = hidden_xD.dtype
    if config.tied:  # the table as it lies: of its transpose XLA makes a copy on CPU
        return times_rows(hidden_xD, params["embed"].astype(dtype), form=summed)[0]
    return summed("...d,dv->...v", hidden_xD, params["unembed"].astype(dtype))
