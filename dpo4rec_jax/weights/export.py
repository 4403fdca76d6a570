"""A policy as a Hugging Face directory that transformers, vLLM and llama.cpp's converter read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dpo4rec_jax.config import InputError
from dpo4rec_jax.runtime.mesh import on_host
from dpo4rec_jax.runtime.processes import this
from dpo4rec_jax.weights import huggingface
from dpo4rec_jax.weights.policy import Policy
from dpo4rec_jax.weights.streaming import Slot

SHARD_BYTES = 4 * 2**30
_NAME_OF = {dtype.name: name for name, dtype in huggingface.DTYPES.items()}


def save_policy(policy: Policy, directory: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes config, safetensors (in shards of at most so many bytes, or of one tensor), tokenizer,
    chat template and generation config. `load_policy` gives the same bits back in the parameter
    dtype. The directory appears whole or not at all, and replaces an earlier export. Of several
    processes, which all hold their part of the weights, the main one writes.

    Raises InputError where the directory holds something other than a checkpoint.
    """
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()) and not (directory / "config.json").exists():
        raise InputError(
            f"{directory}: expected an empty or new directory, or an earlier export to replace; "
            "name another one"
        )
    if not this().main:
        _write_weights(policy, None, shard_bytes)
        return
    partial, old = (directory.with_name(f"{directory.name}.{end}") for end in ("partial", "old"))
    for left in (partial, old):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    policy.tokenizer.save_pretrained(partial)
    dtype = policy.config.param_dtype
    values = {**policy.hf_config, "torch_dtype": dtype}
    if "dtype" in values:  # transformers 5 writes this instead
        values = {**policy.hf_config, "dtype": dtype}
    _write_json(partial / "config.json", values)
    stops = list(policy.stop_ids)
    _write_json(
        partial / "generation_config.json", {**policy.generation_config, "eos_token_id": stops}
    )
    _write_weights(policy, partial, shard_bytes)
    if directory.exists():
        directory.replace(old)
    partial.replace(directory)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_weights(policy: Policy, directory: Path | None, shard_bytes: int) -> None:
    """`directory` None: helps another process to write."""
    slots = huggingface.slots(policy.config)
    itemsize = np.dtype(huggingface.DTYPES[_NAME_OF[policy.config.param_dtype]]).itemsize
    bytes_of = {name: int(np.prod(slot.shape)) * itemsize for name, slot in slots.items()}
    shards: list[list[str]] = [[]]
    for name in slots:
        if (
            shards[-1]
            and sum(bytes_of[other] for other in shards[-1]) + bytes_of[name] > shard_bytes
        ):
            shards.append([])
        shards[-1].append(name)
    file_of = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = "model.safetensors" if len(shards) == 1 else file
        file_of |= dict.fromkeys(names, file)
        path = Path(os.devnull) if directory is None else directory / file
        with path.open("wb") as out:
            write_safetensors(out, {name: (slots[name], policy.params) for name in names})
    if len(shards) > 1 and directory is not None:
        total = {"total_size": sum(bytes_of.values())}
        _write_json(directory / huggingface.INDEX, {"metadata": total, "weight_map": file_of})


def write_safetensors(out: BinaryIO, tensors: dict[str, tuple[Slot, Any]]) -> None:
    """Header, then one tensor after another, so that the host never holds more than one."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (slot, params) in tensors.items():
        dtype = np.dtype(_leaf(slot, params).dtype)
        begin, end = end, end + int(np.prod(slot.shape)) * dtype.itemsize
        entry = {"dtype": _NAME_OF[dtype.name], "shape": slot.shape, "data_offsets": [begin, end]}
        header[name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
    for slot, params in tensors.values():
        leaf = _leaf(slot, params)
        value = on_host(leaf if slot.layer is None else leaf[slot.layer])
        out.write(np.ascontiguousarray(value.T if slot.transpose else value).tobytes())


def _leaf(slot: Slot, params: Any) -> Any:
    for part in slot.path:
        params = params[part]
    return params
