"""GGUF files as llama.cpp's converter lays them out, of small checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import hf_models
import numpy as np

from dpo4rec_jax.weights import load_policy
from dpo4rec_jax.weights.gguf import _gguf_name

WORDS = ["<unk>", "<|im_start|>", "<|im_end|>", *(chr(33 + index) for index in range(93)), "ab"]


def interleave(value: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: halves become adjacent pairs."""
    halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return halves.swapaxes(1, 2).reshape(value.shape)


def write(
    path: Path,
    directory: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str = "llama",
    metadata: Callable[[gguf.GGUFWriter], None] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """The checkpoint of a directory as GGUF, its matrices stored as `kind`."""
    policy = load_policy(directory)
    config = policy.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.hidden)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3] + [1] * 94)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}<|im_end|>")
    if metadata is not None:
        metadata(writer)
    if "tokenizer.ggml.merges" not in writer.kv_data[0]:
        writer.add_token_merges(["a b"])
    named = {_gguf_name(k): v for k, v in hf_models.as_hf(config, policy.params).items()}
    for name, value in (named | (tensors or {})).items():
        heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(name.split(".")[-2])
        if architecture == "llama" and heads:
            value = interleave(value, heads)
        value = np.ascontiguousarray(value, np.float32)
        if value.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
