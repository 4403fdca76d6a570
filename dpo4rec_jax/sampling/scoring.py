"""Log-probabilities of given completions under a policy: what DPO, imitation and drift read."""

from __future__ import annotations

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dpo4rec_jax.config import LoraConfig
from dpo4rec_jax.models import llama
from dpo4rec_jax.models.attention import Implementation, Shared
from dpo4rec_jax.objectives.logprobs import CHUNK_TOKENS, token_logps


def completion_token_logps(
    config: llama.LlamaConfig,
    params: llama.Params,
    prompt_BT: Int[Array, "B Tp"],
    completion_BCT: Int[Array, "B C T"],
    prompt_length_B: Int[Array, " B"],
    completion_length_BC: Int[Array, "B C"],
    packed_BW: Int[Array, "B W"] | None = None,
    *,
    lora: llama.Params | None = None,
    lora_config: LoraConfig | None = None,
    lora_key: Array | None = None,
    remat: llama.Remat = "none",
    implementation: Implementation = "xla",
    mesh: Mesh | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Float[Array, "B C T"]:
    """log p(token | prompt, earlier tokens of its completion), nats, float32; 0 at padding.

    The row [prompt | completion 0 | ...] goes through the model once, so the prompt that C
    completions share is computed once. Its last token predicts the first token of each of them.
    `mesh` is the one that parameters and rows lie on.

    `packed_BW` are the indices of the real ones among a row's C x T tokens, in order, then -1: the
    model then sees no padding between completions (see `Shared`).
    """
    num_rows, num_completions, num_tokens = completion_BCT.shape
    attention = Shared(
        prompt_length_B,
        completion_length_BC,
        prompt_tokens=prompt_BT.shape[1],
        completions=num_completions,
        completion_tokens=num_tokens,
        implementation=implementation,
        mesh=mesh,
        packed_BW=packed_BW,
    )
    index_BW = attention.index_BW
    flat_BX = completion_BCT.reshape(num_rows, -1)
    target_BW = flat_BX if packed_BW is None else jnp.take_along_axis(flat_BX, index_BW, axis=1)
    tokens_BT = jnp.concatenate([prompt_BT, target_BW], axis=1)
    hidden_BTD, _ = llama.apply(
        config,
        params,
        tokens_BT,
        attention.position_BT(),
        attention,
        lora=lora,
        lora_config=lora_config,
        lora_key=lora_key,
        remat=remat,
        mesh=mesh,
    )
    # Gathered over fsdp here, once: inside the loop over chunks TPUs gather it in every turn.
    unembedding_DV = llama.lay(llama.unembedding(config, params), mesh, None, "tensor")
    first_BW = index_BW % num_tokens == 0
    logp_BW = token_logps(
        _predicting(hidden_BTD, prompt_length_B, first_BW),
        unembedding_DV,
        target_BW,
        chunk_tokens=chunk_tokens,
    )
    if packed_BW is not None:
        start_BC = jnp.cumsum(completion_length_BC, axis=1) - completion_length_BC
        at_BCT = start_BC[..., None] + jnp.arange(num_tokens)[None, None]
        at_BX = jnp.minimum(at_BCT, index_BW.shape[1] - 1).reshape(num_rows, -1)
        logp_BW = jnp.take_along_axis(logp_BW, at_BX, axis=1)
    mask_BCT = jnp.arange(num_tokens)[None, None] < completion_length_BC[..., None]
    return jnp.where(mask_BCT, logp_BW.reshape(completion_BCT.shape), 0.0)


def _predicting(hidden_BTD: Array, prompt_length_B: Array, first_BW: Array) -> Array:
    """The hidden state before each of the W tokens behind the prompts: the one before it, but for
    the first token of a completion that of the prompt's last."""
    last_B11 = (prompt_length_B - 1)[:, None, None]
    last_B1D = jnp.take_along_axis(hidden_BTD, last_B11, axis=1)
    before_BWD = hidden_BTD[:, -first_BW.shape[1] - 1 : -1]
    return jnp.where(first_BW[..., None], last_B1D, before_BWD)
