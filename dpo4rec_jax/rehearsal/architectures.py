"""Architectures of policies, without their weights.

The config.json of checkpoints that the hub gives only to who has accepted a licence stands here, so
that a run on them can be rehearsed before that; and that of a small one, to benchmark without the
hub.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from dpo4rec_jax.config import Config
from dpo4rec_jax.models.llama import LlamaConfig
from dpo4rec_jax.weights import outline, tiny
from dpo4rec_jax.weights.hf_config import parse_config
from dpo4rec_jax.weights.policy import resolve_dtypes

_LLAMA_3: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
}
_LLAMA_3_8B = {
    **_LLAMA_3,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
_LLAMA_3_70B = {
    **_LLAMA_3,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
_SMOLLM2_135M: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2_135M,
    "meta-llama/Llama-3.1-8B": _LLAMA_3_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_3_8B,
    "meta-llama/Llama-3.1-70B": _LLAMA_3_70B,
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA_3_70B,
}


def architecture_of(config: Config, platform: str) -> LlamaConfig:
    """The policy's architecture in the dtypes that the config gives it on the platform.

    Raises InputError for a checkpoint that is neither published here nor to be found.
    """
    settings = config.policy
    accelerated = "float32" if platform == "cpu" else "bfloat16"
    dtype = accelerated if settings.dtype == "auto" else settings.dtype
    dtype, held = resolve_dtypes(dtype, settings.param_dtype)
    if settings.path in PUBLISHED:
        return parse_config(PUBLISHED[settings.path], settings.path, dtype=dtype, param_dtype=held)
    if settings.path == "tiny":
        words = map(str, range(256))  # its size is known once the run has made its vocabulary
        tiny_config = tiny.make_tiny(settings, words, jax.random.key(0)).config
        return dataclasses.replace(tiny_config, dtype=dtype, param_dtype=held)
    found, _ = outline(
        settings.path,
        dtype=dtype,
        param_dtype=held,
        tokenizer=settings.tokenizer,
        cache_dir=config.runtime.cache_dir,
    )
    return found
