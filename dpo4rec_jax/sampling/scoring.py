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
    )
    tokens_BT = jnp.concatenate([prompt_BT, completion_BCT.reshape(num_rows, -1)], axis=1)
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
    logp_BT = token_logps(
        _predicting(hidden_BTD, prompt_length_B, completion_BCT.shape, prompt_BT.shape[1]),
        unembedding_DV,
        completion_BCT.reshape(num_rows, -1),
        chunk_tokens=chunk_tokens,
    )
    mask_BCT = jnp.arange(num_tokens)[None, None] < completion_length_BC[..., None]
    return jnp.where(mask_BCT, logp_BT.reshape(completion_BCT.shape), 0.0)


def _predicting(
    hidden_BTD: Array, prompt_length_B: Array, shape_BCT: tuple[int, ...], prompt_tokens: int
) -> Array:
    """The hidden state before each completion token, the completions in a row: B, C x T, D."""
    num_rows, num_completions, num_tokens = shape_BCT
    last_B11 = (prompt_length_B - 1)[:, None, None]
    last_B1D = jnp.take_along_axis(hidden_BTD, last_B11, axis=1)
    own_BCTD = hidden_BTD[:, prompt_tokens:].reshape(*shape_BCT, -1)
    first_BC1D = jnp.broadcast_to(
        last_B1D[:, None], (num_rows, num_completions, 1, own_BCTD.shape[-1])
    )
    before_BCTD = jnp.concatenate([first_BC1D, own_BCTD[:, :, :-1]], axis=2)
    return before_BCTD.reshape(num_rows, num_completions * num_tokens, -1)
