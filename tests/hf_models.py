"""Small random Hugging Face models in torch, one for each member of the family we claim to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dpo4rec_jax.weights import huggingface
from dpo4rec_jax.weights.tiny import make_tokenizer

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# name: (model type, what it changes)
FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama-3": ("llama", {"rope_theta": 500000.0}),
    "llama-3.1": ("llama", {"rope_parameters": LLAMA3}),
    "llama-3.2": (
        "llama",
        {"rope_parameters": {**LLAMA3, "factor": 32.0}, "tie_word_embeddings": True},
    ),
    "llama-biased": ("llama", {"attention_bias": True}),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "non-square": ("llama", {"num_attention_heads": 6, "head_dim": 10}),
    "one-kv-head": ("llama", {"num_key_value_heads": 1, "head_dim": 6}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "mistral-without-window": ("mistral", {"sliding_window": None}),
    "qwen-2": ("qwen2", {}),
    "qwen-2.5": ("qwen2", {"tie_word_embeddings": True, "rope_theta": 1000000.0}),
    "qwen-3": ("qwen3", {"head_dim": 16}),
}


def make_model(name: str, seed: int = 0) -> Any:
    """A torch model in float32 with every parameter random: no norm is one, no bias zero."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, changes = FAMILY[name]
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    config.eos_token_id, config.bos_token_id, config.pad_token_id = 2, None, None
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    for key, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        value.data = 1 + 0.2 * noise if "norm" in key else 0.1 * noise
    return model


def save_model(model: Any, directory: Path) -> Path:
    """The model and a word-level tokenizer that fits it, as a Hugging Face directory."""
    model.save_pretrained(directory)
    make_tokenizer([f"word{index}" for index in range(40)]).save_pretrained(directory)
    return directory


def hf_logits(model: Any, tokens_BT: np.ndarray, position_BT: np.ndarray | None = None) -> Any:
    import torch

    positions = None if position_BT is None else torch.tensor(position_BT)
    with torch.no_grad():
        return model(torch.tensor(tokens_BT), position_ids=positions).logits.float().numpy()


def as_hf(config: Any, params: Any) -> dict[str, np.ndarray]:
    """Our tree under Hugging Face's names and layout: for comparing parameters or gradients."""
    named = {}
    for name, slot in huggingface.slots(config).items():
        leaf = params
        for part in slot.path:
            leaf = leaf[part]
        value = np.asarray(leaf if slot.layer is None else leaf[slot.layer])
        named[name] = value.T if slot.transpose else value
    return named
