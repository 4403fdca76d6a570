"""GGUF files (llama.cpp's format): dequantised weights, and the tokenizer out of the metadata.

Read with the `gguf` package (extra [gguf]); transformers' own GGUF reading needs torch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo4rec_jax.config import InputError
from dpo4rec_jax.models.llama import LlamaConfig
from dpo4rec_jax.weights import gguf_header, gguf_tokenizer, hf_config, huggingface, streaming
from dpo4rec_jax.weights.policy import Policy, place, shapes
from dpo4rec_jax.weights.streaming import StoredTensor
from dpo4rec_jax.weights.tokenizer import check_fit, load_tokenizer, stop_ids

QUANTISATIONS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
# GGUF's "llama" is Mistral's too. The other families keep HF's order of rotary rows.
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def load(
    path: Path,
    dtypes: tuple[str, str],
    tokenizer_path: str | Path | None,
    mesh: jax.sharding.Mesh | None,
) -> Policy:
    """A policy from a GGUF file; `dtypes` are those computed in and held in.

    Raises InputError for a file that is missing, damaged, of another architecture or quantised in
    another way, and for a tokenizer that we cannot rebuild exactly.
    """
    config, tokenizer, values, reader = outline(path, dtypes, tokenizer_path)
    slots = {_gguf_name(name): slot for name, slot in huggingface.slots(config).items()}
    tensors = _tensors(reader, path, config, permuted=values["model_type"] == "llama")
    streaming.check_keys(slots, tensors, str(path))
    params = streaming.stream(slots, tensors, shapes(config), place(shapes(config), mesh))
    generation = {key: values[key] for key in ("bos_token_id", "eos_token_id") if key in values}
    return Policy(config, params, tokenizer, stop_ids(tokenizer, values), values, generation)


def outline(
    path: Path, dtypes: tuple[str, str], tokenizer_path: str | Path | None
) -> tuple[LlamaConfig, Any, dict[str, Any], Any]:
    """Architecture, tokenizer, the equivalent config.json, and the open file."""
    reader = _open(path)
    with _one_line(path, "damaged or not a GGUF file"):
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        values = read_config(metadata, reader, path)
    config = hf_config.parse_config(values, str(path), dtype=dtypes[0], param_dtype=dtypes[1])
    if tokenizer_path is None:
        with _one_line(path, "the tokenizer cannot be rebuilt"):
            tokenizer = gguf_tokenizer.build(metadata, path)
    else:
        tokenizer = load_tokenizer(tokenizer_path)
    check_fit(tokenizer, config.vocab_size, str(tokenizer_path or path))
    return config, tokenizer, values, reader


def _open(path: Path) -> Any:
    try:
        import gguf
    except ModuleNotFoundError:
        raise InputError(
            f"{path}: reading GGUF needs the gguf package; pip install dpo4rec-jax[gguf]"
        ) from None
    if not path.is_file():
        raise InputError(f"{path}: expected a GGUF file, got none")
    with _one_line(path, "damaged or not a GGUF file"):
        gguf_header.check(path)
        return gguf.GGUFReader(path)


@contextlib.contextmanager
def _one_line(path: Path, what: str) -> Iterator[None]:
    """The gguf and tokenizers packages raise whatever a damaged file leads them to."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: {what}: {reason}") from None


def read_config(metadata: Mapping[str, Any], reader: Any, path: Path) -> dict[str, Any]:
    """The metadata as the config.json that describes the same model to Hugging Face tools."""
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"{path}: architecture: expected one of {known}, got {architecture!r}")
    get = functools.partial(_metadata_of, metadata, f"{architecture}.", path)
    if get("expert_count", 0):
        raise InputError(f"{path}: expected a dense model, got {get('expert_count')} experts")
    scaling = get("rope.scaling.type", "none")
    names = {tensor.name for tensor in reader.tensors}
    if scaling != "none" or "rope_freqs.weight" in names:
        raise InputError(
            f"{path}: rope scaling ({scaling}) is not read from GGUF; use the Hugging Face "
            "checkpoint of this model"
        )
    width, heads = get("embedding_length"), get("attention.head_count")
    head_dim = get("attention.key_length", width // max(heads, 1))
    if get("rope.dimension_count", head_dim) != head_dim:
        raise InputError(f"{path}: expected rotary embedding on all {head_dim} of a head's values")
    vocab_size = next((int(t.shape[1]) for t in reader.tensors if t.name == "token_embd.weight"), 0)
    values = {
        "architectures": [f"{architecture.capitalize()}ForCausalLM"],
        "model_type": ARCHITECTURES[architecture],
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": _shortest(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(get("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in names,
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if token is not None:
            values[f"{ours}_token_id"] = int(token)
    return values


def _metadata_of(
    metadata: Mapping[str, Any], prefix: str, path: Path, key: str, default: Any = None
) -> Any:
    value = metadata.get(prefix + key, default)
    if value is None:
        raise InputError(f"{path}: {prefix}{key}: missing from the metadata")
    return value


def _shortest(value: float) -> float:
    """The decimal that the float32 in the file was written from (9.99999974e-06 is 1e-05)."""
    return float(str(np.float32(value)))


def _gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` as `blk.3.ffn_up.weight`."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        layer, _, module = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{_NAMES[module]}.{kind}"
    return f"{_NAMES[stem]}.{kind}"


def _tensors(
    reader: Any, path: Path, config: LlamaConfig, permuted: bool
) -> dict[str, StoredTensor]:
    tensors = {}
    for tensor in reader.tensors:
        if tensor.tensor_type.name not in QUANTISATIONS:
            raise InputError(
                f"{path}: {tensor.name}: expected {', '.join(QUANTISATIONS)}, got "
                f"{tensor.tensor_type.name}"
            )
        if tensor.name in tensors:
            raise InputError(f"{path}: {tensor.name}: stored twice")
        heads = None
        if permuted and tensor.name.endswith("attn_q.weight"):
            heads = config.heads
        elif permuted and tensor.name.endswith("attn_k.weight"):
            heads = config.kv_heads
        shape = tuple(int(size) for size in reversed(tensor.shape))
        read = functools.partial(_dequantise, tensor, shape, heads)
        tensors[tensor.name] = StoredTensor(str(path), shape, read)
    return tensors


def _dequantise(tensor: Any, shape: tuple[int, ...], heads: int | None) -> np.ndarray:
    """float32 values; rows of q and k of each head taken back from llama.cpp's interleaved pairs
    (0, 1), (2, 3) ... to HF's halves (0, d/2), (1, d/2 + 1) ..."""
    from gguf.quants import dequantize

    values = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    if heads is None:
        return values
    pairs = values.reshape(heads, shape[0] // heads // 2, 2, *shape[1:])
    return pairs.swapaxes(1, 2).reshape(shape)
