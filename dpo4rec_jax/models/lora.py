"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) as a tree of their own beside a frozen base.

{"layers": {"q": {"a": [L, in, R], "b": [L, R, out]}, ...}}       float32, whatever the base is
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dpo4rec_jax.config import LoraConfig
from dpo4rec_jax.models.llama import LlamaConfig, Params


def projection_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of every projection an adapter may sit on."""
    query, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return {
        "q": (config.width, query),
        "k": (config.width, kv),
        "v": (config.width, kv),
        "o": (query, config.width),
        "gate": (config.width, config.hidden),
        "up": (config.width, config.hidden),
        "down": (config.hidden, config.width),
    }


def init(config: LlamaConfig, lora: LoraConfig, key: Array) -> dict[str, Any]:
    """A random (He-uniform, as PEFT) and B zero: the adapted policy starts as its base, exactly."""
    tree = {}
    for index, (name, (fan_in, fan_out)) in enumerate(projection_shapes(config).items()):
        if name not in lora.targets:
            continue
        bound = fan_in**-0.5
        shape_LDR = (config.layers, fan_in, lora.rank)
        leaf_key = jax.random.fold_in(key, index)
        a_LDR = jax.random.uniform(leaf_key, shape_LDR, jnp.float32, -bound, bound)
        tree[name] = {"a": a_LDR, "b": jnp.zeros((config.layers, lora.rank, fan_out), jnp.float32)}
    return {"layers": tree}


def merge(params: Params, lora: Params, lora_config: LoraConfig) -> dict[str, Any]:
    """The base with (alpha / rank) A B added in float32 and cast back to each kernel's dtype."""
    layers = dict(params["layers"])
    for name, adapter in lora["layers"].items():
        kernel_LDO = layers[name]["kernel"]
        update_LDO = jnp.matmul(adapter["a"], adapter["b"], precision=jax.lax.Precision.HIGHEST)
        merged_LDO = kernel_LDO.astype(jnp.float32) + update_LDO * _scale(adapter, lora_config)
        layers[name] = {**layers[name], "kernel": merged_LDO.astype(kernel_LDO.dtype)}
    return {**params, "layers": layers}


def _scale(adapter: Params, lora_config: LoraConfig) -> float:
    return lora_config.alpha / adapter["a"].shape[-1]
