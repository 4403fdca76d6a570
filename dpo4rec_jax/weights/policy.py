"""The policy: an architecture, its parameters and its tokenizer in one value."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dpo4rec_jax.config import InputError
from dpo4rec_jax.models import llama
from dpo4rec_jax.models.attention import Causal
from dpo4rec_jax.runtime import mesh as meshes

# Llama 3.2's template writes today's date unless told one; a prompt must not change overnight.
_TEMPLATE_DATE = "26 Jul 2024"


@dataclasses.dataclass(frozen=True)
class Policy:
    """What `load_policy` gives. `stop_ids` end a reply; `hf_config` and `generation_config` are the
    checkpoint's own JSON, kept for export."""

    config: llama.LlamaConfig
    params: llama.Params
    tokenizer: Any
    stop_ids: tuple[int, ...]
    hf_config: Mapping[str, Any]
    generation_config: Mapping[str, Any]

    def logits(self, tokens_BT: Any, length_B: Any) -> Float[Array, "B T V"]:
        """Logits (float32) of right-padded ids, as numpy or jax integers. What stands at positions
        from a row's length on is finite and meaningless.

        Raises InputError for ids outside the vocabulary and lengths outside the row.
        """
        tokens_BT, length_B = np.asarray(tokens_BT), np.asarray(length_B)
        if tokens_BT.ndim != 2 or length_B.shape != tokens_BT.shape[:1]:
            raise InputError(
                f"logits: expected tokens [B, T] and lengths [B], got {list(tokens_BT.shape)} and "
                f"{list(length_B.shape)}"
            )
        if tokens_BT.size and not 0 <= tokens_BT.min() <= tokens_BT.max() < self.config.vocab_size:
            raise InputError(
                f"logits: expected ids from 0 to {self.config.vocab_size - 1}, got "
                f"{tokens_BT.min()} to {tokens_BT.max()}"
            )
        if length_B.size and not 0 <= length_B.min() <= length_B.max() <= tokens_BT.shape[1]:
            raise InputError(
                f"logits: expected lengths from 0 to {tokens_BT.shape[1]}, got {length_B.min()} to "
                f"{length_B.max()}"
            )
        sharding = self.params["embed"].sharding
        mesh = sharding.mesh if isinstance(sharding, jax.sharding.NamedSharding) else None
        tokens_BT, length_B = tokens_BT.astype(np.int32), length_B.astype(np.int32)
        return _logits(self.config, self.params, tokens_BT, length_B, mesh)

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The prompt of a chat by the tokenizer's own template, ready for the reply."""
        return chat_ids(self.tokenizer, messages)


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The prompt of a chat by the tokenizer's own template, ready for the reply.

    Raises InputError for a tokenizer without a template or messages that it refuses.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"policy.tokenizer: {tokenizer.name_or_path or 'the tokenizer'} has no chat "
            "template; name an instruction-tuned model or a tokenizer that has one"
        )
    try:
        # The template writes the BOS; the tokenizer must not add a second one.
        text = tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=True,
            date_string=_TEMPLATE_DATE,
        )
    except Exception as error:  # jinja2's errors, raised by the template itself
        raise InputError(f"policy.tokenizer: its chat template refuses: {error}") from None
    return tokenizer.encode(text, add_special_tokens=False)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _logits(
    config: llama.LlamaConfig,
    params: llama.Params,
    tokens_BT: Array,
    length_B: Array,
    mesh: jax.sharding.Mesh | None,
) -> Array:
    attention = Causal(length_B)
    position_BT = attention.position_BT(tokens_BT.shape[1])
    hidden_BTD, _ = llama.apply(config, params, tokens_BT, position_BT, attention, mesh=mesh)
    return llama.unembed(config, params, hidden_BTD)


@functools.lru_cache(maxsize=16)
def shapes(config: llama.LlamaConfig) -> dict[str, Any]:
    """Shape and dtype of every parameter, nothing allocated."""
    return jax.eval_shape(functools.partial(llama.init, config), jax.random.key(0))


def place(shapes: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """The sharding of every parameter: by the rules on a mesh, else whole on the first device."""
    if mesh is not None:
        return meshes.shardings(shapes, mesh)
    alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda _: alone, shapes)


def resolve_dtypes(dtype: str, param_dtype: str | None) -> tuple[str, str]:
    """Compute and parameter dtype: `auto` computes in bfloat16 on accelerators and float32 on CPU;
    parameters are held in the compute dtype unless said otherwise."""
    for name, value in (("dtype", dtype), ("param_dtype", param_dtype)):
        if value not in ("auto", "float32", "bfloat16", None):
            raise InputError(f"policy.{name}: expected auto, float32 or bfloat16, got {value!r}")
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if param_dtype in (None, "auto"):
        param_dtype = dtype
    return jnp.dtype(dtype).name, jnp.dtype(param_dtype).name
