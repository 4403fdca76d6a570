"""A checkpoint's config.json as a LlamaConfig, in the spellings of transformers 4 and 5.

Every key must be understood, known to leave the numbers alone, or switched off: a feature that we
would silently compute differently stops the load by its name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo4rec_jax.config import InputError
from dpo4rec_jax.models.llama import LlamaConfig
from dpo4rec_jax.models.rope import RopeScaling
from dpo4rec_jax.workspace import parse_json

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")

_UNDERSTOOD = {
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps"),
    *("max_position_embeddings", "tie_word_embeddings", "attention_bias", "mlp_bias"),
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
    *("rope_interleaved", "sliding_window", "use_sliding_window", "max_window_layers"),
    *("layer_types",),
}
# Training, generation and provenance: the logits do not depend on them.
_HARMLESS = {
    *("architectures", "attention_dropout", "auto_map", "bos_token_id", "eos_token_id"),
    *("pad_token_id", "unk_token_id", "dtype", "torch_dtype", "initializer_range", "use_cache"),
    *("pretraining_tp", "transformers_version", "_name_or_path", "name_or_path", "model_name"),
    *("is_llama_config", "hidden_dropout", "resid_pdrop", "embd_pdrop", "output_attentions"),
    *("output_hidden_states", "return_dict", "use_return_dict", "chunk_size_feed_forward"),
    *("is_encoder_decoder", "id2label", "label2id", "problem_type", "tokenizer_class", "prefix"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset"),
    *("transformers.js_config", "unsloth_fixed", "unsloth_version", "task_specific_params"),
    *("gradient_checkpointing", "max_length", "max_sequence_length", "torchscript"),
    *("license", "finetuning_task", "use_bfloat16", "_flash_attn_2_enabled"),
}
_REQUIRED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    "num_attention_heads",
)
_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint directory; InputError where it is missing or is not one."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path}: not there; expected a Hugging Face directory with {path.name}"
        ) from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def parse_config(
    values: Mapping[str, Any], source: str, *, dtype: str = "float32", param_dtype: str = "float32"
) -> LlamaConfig:
    """The architecture that config.json describes; `source` names it in messages.

    Raises InputError naming the first key that is missing, of an architecture we do not know, or
    that asks for a computation other than ours.
    """
    family = values.get("model_type")
    if family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"{source}: model_type: expected one of {known}, got {family!r}")
    _check_types(values, source)
    _refuse_unknown(values, source)
    width, heads = values["hidden_size"], values["num_attention_heads"]
    head_dim = values.get("head_dim") or (128 if family == "qwen3" else width // heads)
    kv_heads = values.get("num_key_value_heads") or heads
    if heads % kv_heads or head_dim % 2:
        raise InputError(
            f"{source}: expected num_key_value_heads to divide num_attention_heads and an even "
            f"head_dim, got {kv_heads}, {heads} and {head_dim}"
        )
    theta, scaling = _rope(values, source)
    all_biased = family in ("llama", "qwen3") and bool(values.get("attention_bias", False))
    return LlamaConfig(
        vocab_size=values["vocab_size"],
        width=width,
        hidden=values["intermediate_size"],
        layers=values["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_eps=float(values.get("rms_norm_eps", 1e-6)),
        tied=bool(values.get("tie_word_embeddings", False)),
        attention_bias=family == "qwen2" or all_biased,
        output_bias=all_biased,
        qk_norm=family == "qwen3",
        sliding_window=_sliding_window(values, family, source),
        max_position=values.get("max_position_embeddings") or LlamaConfig.max_position,
        dtype="bfloat16" if dtype == "bfloat16" else "float32",
        param_dtype="bfloat16" if param_dtype == "bfloat16" else "float32",
    )


def _check_types(values: Mapping[str, Any], source: str) -> None:
    for key in (*_REQUIRED, *_SIZES):
        size = values.get(key)
        if size is None and key in _SIZES:
            continue
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InputError(f"{source}: {key}: expected a whole number from 1, got {size!r:.80}")
    _check_positive(values.get("rms_norm_eps", 1e-6), f"{source}: rms_norm_eps")
    if not isinstance(values.get("max_window_layers", 0), int):
        raise InputError(
            f"{source}: max_window_layers: expected a whole number, got "
            f"{values['max_window_layers']!r:.80}"
        )
    for key, kind in (("rope_scaling", dict), ("rope_parameters", dict), ("layer_types", list)):
        if not isinstance(values.get(key), kind | None):
            word = "an object" if kind is dict else "a list"
            raise InputError(f"{source}: {key}: expected {word}, got {values[key]!r:.80}")


def _check_positive(number: Any, where: str) -> None:
    if not isinstance(number, int | float) or not 0 < number < math.inf:
        raise InputError(f"{where}: expected a number above 0, got {number!r:.80}")


def _refuse_unknown(values: Mapping[str, Any], source: str) -> None:
    for key, value in values.items():
        if key not in _UNDERSTOOD | _HARMLESS and value not in (None, False, 0, "", [], {}):
            raise InputError(
                f"{source}: {key}: a feature we do not compute, got {value!r:.80}; remove the key "
                "if it does not change the model's outputs"
            )
    for key, expected in (("hidden_act", "silu"), ("mlp_bias", False), ("rope_interleaved", False)):
        if values.get(key, expected) != expected:
            raise InputError(f"{source}: {key}: expected {expected!r}, got {values[key]!r}")


def _rope(values: Mapping[str, Any], source: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`."""
    key = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    rope = values.get(key) or {}
    where = f"{source}: {key}"
    theta = rope.get("rope_theta") or values.get("rope_theta") or 10000.0
    _check_positive(theta, f"{source}: rope_theta")
    theta = float(theta)
    kind = rope.get("rope_type", rope.get("type", "default"))
    fraction = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if fraction not in (None, 1, 1.0):
        raise InputError(f"{where}: partial_rotary_factor: expected 1, got {fraction!r}")
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise InputError(f"{where}: rope_type: expected default, linear or llama3, got {kind!r}")
    wanted = ["factor"]
    if kind == "llama3":
        wanted += ["low_freq_factor", "high_freq_factor"]
    for name in wanted:
        _check_positive(rope.get(name), f"{where}: {name}")
    if kind == "linear":
        return theta, RopeScaling("linear", float(rope["factor"]))
    original: Any = rope.get("original_max_position_embeddings")
    original = original or values.get("max_position_embeddings")
    _check_positive(original, f"{where}: original_max_position_embeddings")
    return theta, RopeScaling(
        kind="llama3",
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position=int(original),
    )


def _sliding_window(values: Mapping[str, Any], family: str, source: str) -> int | None:
    if family == "llama":
        window = values.get("sliding_window")
        if window is not None:
            raise InputError(f"{source}: sliding_window: llama has none, got {window!r}")
        return None
    if family == "mistral":
        return values.get("sliding_window", 4096)
    if not values.get("use_sliding_window", False):
        return None
    layers = values["num_hidden_layers"]
    first = values.get("max_window_layers", 28)
    slides = {
        kind == "sliding_attention"
        for kind in values.get("layer_types")
        or ["full_attention"] * min(first, layers) + ["sliding_attention"] * max(layers - first, 0)
    }
    if slides == {False}:
        return None
    if slides == {True}:
        return values.get("sliding_window", 4096)
    raise InputError(
        f"{source}: layer_types: expected one kind of attention in all layers, got a mix"
    )
