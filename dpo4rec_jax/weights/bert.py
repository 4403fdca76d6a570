"""Hugging Face BERT checkpoints as parameters of `models.bert`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dpo4rec_jax.config import InputError
from dpo4rec_jax.models.bert import ACTIVATIONS, BertConfig
from dpo4rec_jax.weights.hf_config import read_json
from dpo4rec_jax.weights.huggingface import stored_tensors

SIZES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "hidden": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "positions": "max_position_embeddings",
}
EXPECTED = {
    "hidden_act": tuple(ACTIVATIONS),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
}
UNUSED = ("pooler.", "cls.")  # heads of tasks, behind the hidden states that we read


def load_bert(directory: Path, dtype: str) -> tuple[BertConfig, dict[str, Any]]:
    """Reads `config.json` and the safetensors of a BERT directory.

    Raises InputError for another architecture, a missing or damaged file, and for keys that are
    missing, unknown or of another shape.
    """
    path = directory / "config.json"
    config = parse_config(read_json(path), str(path), dtype)
    tensors = stored_tensors(directory, tied=False)
    state = {name: tensor.read() for name, tensor in tensors.items()}
    return config, params_from_state(config, state, str(directory))


def parse_config(values: Mapping[str, Any], source: str, dtype: str = "float32") -> BertConfig:
    """The architecture that config.json describes; `source` names it in messages."""
    if values.get("model_type") != "bert":
        raise InputError(
            f"{source}: model_type: expected bert, got {values.get('model_type')!r}; give another "
            "encode.encoder, or encode.encoder=policy to encode with the LLM itself"
        )
    for key, known in EXPECTED.items():
        if values.get(key, known[0]) not in known:
            raise InputError(
                f"{source}: {key}: expected {' or '.join(map(str, known))}, got {values[key]!r}; "
                "give another encode.encoder"
            )
    sizes = {}
    for ours, theirs in SIZES.items():
        sizes[ours] = values.get(theirs)
        if not isinstance(sizes[ours], int) or sizes[ours] < 1:
            raise InputError(
                f"{source}: {theirs}: expected a whole number from 1, got {sizes[ours]!r:.80}"
            )
    return BertConfig(
        **sizes,
        token_types=values.get("type_vocab_size", 2),
        norm_eps=values.get("layer_norm_eps", 1e-12),
        activation=values.get("hidden_act", "gelu"),
        dtype="bfloat16" if dtype == "bfloat16" else "float32",
    )


def params_from_state(
    config: BertConfig, state: Mapping[str, np.ndarray], where: str = "weights"
) -> dict[str, Any]:
    """Renames, transposes, fuses query/key/value and stacks the layers, in float32.

    `where` begins the message of the InputError that a missing, unknown or misshapen key raises.
    """
    reader = _Reader({_canonical(name): tensor for name, tensor in state.items()}, where)
    width = config.width
    params = {
        "token": reader.take("embeddings.word_embeddings.weight", config.vocab_size, width),
        "position": reader.take("embeddings.position_embeddings.weight", config.positions, width),
        "token_type": reader.take(
            "embeddings.token_type_embeddings.weight", config.token_types, width
        ),
        "norm": reader.norm("embeddings.LayerNorm", width),
    }
    layers = [_layer(reader, f"encoder.layer.{index}.", config) for index in range(config.layers)]
    params["layers"] = {
        module: {name: np.stack([layer[module][name] for layer in layers]) for name in parts}
        for module, parts in layers[0].items()
    }
    reader.expect_empty()
    return params


def _layer(reader: _Reader, prefix: str, config: BertConfig) -> dict[str, dict[str, np.ndarray]]:
    width, hidden = config.width, config.hidden
    qkv = [
        reader.dense(f"{prefix}attention.self.{name}", width, width)
        for name in ("query", "key", "value")
    ]
    return {
        "qkv": {
            name: np.concatenate([part[name] for part in qkv], axis=-1)
            for name in ("kernel", "bias")
        },
        "out": reader.dense(f"{prefix}attention.output.dense", width, width),
        "attention_norm": reader.norm(f"{prefix}attention.output.LayerNorm", width),
        "up": reader.dense(f"{prefix}intermediate.dense", width, hidden),
        "down": reader.dense(f"{prefix}output.dense", hidden, width),
        "mlp_norm": reader.norm(f"{prefix}output.LayerNorm", width),
    }


def _canonical(name: str) -> str:
    """Checkpoints of whole models carry a prefix, those converted from TensorFlow other norms."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )


class _Reader:
    """Takes each key once, checks its shape, and knows in the end what was left over."""

    def __init__(self, state: dict[str, np.ndarray], where: str):
        self._state, self._where = state, where

    def take(self, name: str, *shape: int) -> np.ndarray:
        tensor = self._state.pop(name, None)
        if tensor is None:
            raise InputError(f"{self._where}: {name}: missing; the checkpoint is not a whole BERT")
        if tensor.shape != shape:
            raise InputError(
                f"{self._where}: {name}: expected shape {shape} by config.json, got {tensor.shape}"
            )
        return tensor.astype(np.float32)

    def dense(self, name: str, inputs: int, outputs: int) -> dict[str, np.ndarray]:
        kernel = self.take(f"{name}.weight", outputs, inputs).T
        return {"kernel": kernel, "bias": self.take(f"{name}.bias", outputs)}

    def norm(self, name: str, width: int) -> dict[str, np.ndarray]:
        return {
            "scale": self.take(f"{name}.weight", width),
            "bias": self.take(f"{name}.bias", width),
        }

    def expect_empty(self) -> None:
        unknown = sorted(name for name in self._state if not name.startswith(UNUSED))
        if unknown:
            raise InputError(
                f"{self._where}: {unknown[0]}: unknown key ({len(unknown)} in all); config.json "
                "belongs to another checkpoint"
            )
