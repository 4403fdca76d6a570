"""LoRA adapters in the format of Hugging Face's peft, in and out."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dpo4rec_jax.config import InputError, LoraConfig
from dpo4rec_jax.models import lora
from dpo4rec_jax.models.llama import LlamaConfig, Params
from dpo4rec_jax.runtime.processes import this
from dpo4rec_jax.weights import export, hf_config, huggingface, streaming
from dpo4rec_jax.weights.policy import Policy, place
from dpo4rec_jax.weights.streaming import Slot

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(.+)\.lora_([AB])\.weight")
# Variants that compute something other than x W + (alpha / r) x A B on the projections.
_OFF = {
    **dict.fromkeys(("use_dora", "fan_in_fan_out", "lora_bias", "modules_to_save"), None),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "layers_to_transform"), None),
    **dict.fromkeys(("layers_pattern", "layer_replication", "trainable_token_indices"), None),
    **dict.fromkeys(("exclude_modules", "target_parameters", "alora_invocation_tokens"), None),
    **dict.fromkeys(("use_qalora", "use_bdlora", "arrow_config", "kasa_config"), None),
}


def slots(config: LlamaConfig, rank: int, targets: Sequence[str]) -> dict[str, Slot]:
    """Every tensor of an adapter on these projections, and the leaf of our tree that it becomes."""
    table = {}
    shapes = lora.projection_shapes(config)
    for layer in range(config.layers):
        for ours, theirs in huggingface.PROJECTIONS.items():
            if ours not in targets:
                continue
            fan_in, fan_out = shapes[ours]
            prefix = f"base_model.model.model.layers.{layer}.{theirs}."
            path = ("layers", ours)
            a = Slot((*path, "a"), (rank, fan_in), layer, transpose=True)
            b = Slot((*path, "b"), (fan_out, rank), layer, transpose=True)
            table[f"{prefix}lora_A.weight"], table[f"{prefix}lora_B.weight"] = a, b
    return table


def save_adapter(
    directory: str | Path,
    config: LlamaConfig,
    adapter: Params,
    lora_config: LoraConfig,
    base: str = "",
) -> None:
    """Writes an adapter directory that `peft` loads on the base model named by `base`. Of several
    processes the main one writes; the adapter is whole in it."""
    if not this().main:
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    targets = [name for name in huggingface.PROJECTIONS if name in adapter["layers"]]
    rank = int(adapter["layers"][targets[0]]["a"].shape[-1])
    table = slots(config, rank, targets)
    with (directory / WEIGHTS).open("wb") as out:
        export.write_safetensors(out, {name: (slot, adapter) for name, slot in table.items()})
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": lora_config.alpha,
        "lora_dropout": lora_config.dropout,
        "target_modules": [huggingface.PROJECTIONS[name].rpartition(".")[2] for name in targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (directory / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load_adapter(
    directory: str | Path, config: LlamaConfig, mesh: jax.sharding.Mesh | None = None
) -> tuple[dict[str, Any], LoraConfig]:
    """An adapter of `peft` as our tree (float32), on the mesh if there is one, and its config.

    Raises InputError for another method than LoRA, a variant that we do not compute, pickled or
    damaged weights, and an adapter of another base model.
    """
    directory = Path(directory)
    values = hf_config.read_json(directory / CONFIG)
    source = directory / CONFIG
    if values.get("peft_type") != "LORA":
        raise InputError(f"{source}: peft_type: expected LORA, got {values.get('peft_type')!r}")
    for key in _OFF:
        if values.get(key):
            raise InputError(f"{source}: {key}: a variant we do not compute, got {values[key]!r}")
    if values.get("bias", "none") != "none":
        raise InputError(f"{source}: bias: expected 'none', got {values['bias']!r}")
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise InputError(f"{source}: expected r and lora_alpha, got {rank!r} and {alpha!r}")
    if not (directory / WEIGHTS).exists():
        raise InputError(
            f"{directory}: expected {WEIGHTS}; a pickled adapter_model.bin is never read"
        )
    tensors = huggingface.read_header(directory / WEIGHTS)
    targets = _targets(tensors, str(directory / WEIGHTS))
    table = slots(config, rank, targets)
    streaming.check_keys(table, tensors, str(directory))
    # rsLoRA divides by sqrt(r); as an alpha of ours that is alpha * sqrt(r).
    alpha = alpha * math.sqrt(rank) if values.get("use_rslora") else alpha
    dropout = float(values.get("lora_dropout") or 0.0)
    lora_config = LoraConfig(rank=rank, alpha=alpha, dropout=dropout, targets=targets)
    shapes = jax.eval_shape(functools.partial(lora.init, config, lora_config), jax.random.key(0))
    return streaming.stream(table, tensors, shapes, place(shapes, mesh)), lora_config


def _targets(tensors: Mapping[str, Any], file: str) -> list[Any]:
    ours_of = {theirs: ours for ours, theirs in huggingface.PROJECTIONS.items()}
    found = set()
    for name in tensors:
        match = _KEY.fullmatch(name)
        if match is None or match[2] not in ours_of:
            raise InputError(f"{file}: {name}: not a LoRA matrix of a projection that we adapt")
        found.add(ours_of[match[2]])
    return [name for name in huggingface.PROJECTIONS if name in found]


def combine(
    adapters: Sequence[tuple[Params, LoraConfig]],
) -> tuple[dict[str, Any], LoraConfig]:
    """One adapter that adds what all of them add: ranks concatenated, scales folded into B.

    All must sit on the same projections, as the rounds of one run do.
    """
    trees = [adapter["layers"] for adapter, _ in adapters]
    assert all(tree.keys() == trees[0].keys() for tree in trees)
    layers = {}
    for name in trees[0]:
        scaled = [
            tree[name]["b"] * (lora_config.alpha / tree[name]["a"].shape[-1])
            for tree, (_, lora_config) in zip(trees, adapters, strict=True)
        ]
        a_LDR = jnp.concatenate([tree[name]["a"] for tree in trees], axis=2)
        layers[name] = {"a": a_LDR, "b": jnp.concatenate(scaled, axis=1)}
    rank = next(iter(layers.values()))["a"].shape[-1]
    first = adapters[0][1]
    return {"layers": layers}, first.model_copy(update={"rank": rank, "alpha": float(rank)})


def merge_adapters(
    policy: Policy, directories: Sequence[str | Path], mesh: jax.sharding.Mesh | None = None
) -> Policy:
    """The policy with the adapters added to its weights, in order."""
    params = policy.params
    for directory in directories:
        adapter, lora_config = load_adapter(directory, policy.config, mesh)
        params = lora.merge(params, adapter, lora_config)
    return dataclasses.replace(policy, params=params)
