"""What the method itself needs, counted from the architecture: products, and tensor parallelism's
all-reduces. The compiler's figures stand beside these, and the difference is waste."""

from __future__ import annotations

from dpo4rec_jax.models import lora
from dpo4rec_jax.models.llama import LlamaConfig
from dpo4rec_jax.runtime.loader import Shape


def projection_parameters(architecture: LlamaConfig) -> int:
    """Weights that every token is multiplied with, the unembedding left out."""
    sizes = lora.projection_shapes(architecture).values()
    return architecture.layers * sum(fan_in * fan_out for fan_in, fan_out in sizes)


def flops_of_attention(architecture: LlamaConfig, seen: float) -> float:
    """Of all layers, forward, where queries and the keys they see make so many pairs."""
    return 4.0 * architecture.layers * architecture.heads * architecture.head_dim * seen


def flops_of_pairs(architecture: LlamaConfig, shape: Shape, pairs: int, *, full: bool) -> float:
    """Forward and backward of rows [prompt | chosen | rejected]. The backward pass is two forward
    ones; one under adapters, whose own products are below a hundredth. Logits are of completion
    tokens only."""
    prompt, completion, _ = shape
    tokens = prompt + 2 * completion
    dense = 2.0 * projection_parameters(architecture) * tokens
    logits = 2.0 * architecture.width * architecture.vocab_size * 2 * completion
    # Attention has no weights: its backward pass is two forward ones, always.
    passes = 3 if full else 2
    return pairs * (passes * (dense + logits) + 3 * flops_of_attention(architecture, _seen(shape)))


def _seen(shape: Shape) -> float:
    """Pairs of a query and a key that it sees, in a row [prompt | chosen | rejected]."""
    prompt, completion, _ = shape
    own = completion * (completion + 1) / 2
    return prompt * (prompt + 1) / 2 + 2 * (own + prompt * completion)


# Products of attention's backward pass, which recomputes the scores, over the forward pass's two:
# splash does so in each of two kernels.
BACKWARD = {"splash": 7 / 2, "cudnn": 5 / 2, "xla": 5 / 2}


def flops_of_attention_kernels(
    architecture: LlamaConfig, shape: Shape, implementation: str, *, remat: bool
) -> float:
    """Of one row, done by a kernel: forward, again where the layer is recomputed, and backward."""
    passes = 1 + remat + BACKWARD[implementation]
    return passes * flops_of_attention(architecture, _seen(shape))


def flops_of_prefill(
    architecture: LlamaConfig, prompt_tokens: int, chunk: int, chunks: int
) -> float:
    """Of chunks that stand in the middle of their prompts. The last layer only fills its cache."""
    sizes = lora.projection_shapes(architecture)
    cached = sum(fan_in * fan_out for fan_in, fan_out in (sizes["k"], sizes["v"]))
    layers = 1 - 1 / architecture.layers
    dense = 2.0 * (layers * projection_parameters(architecture) + cached) * chunk
    seen = layers * flops_of_attention(architecture, chunk * prompt_tokens / 2)
    return chunks * (dense + seen)


def flops_of_token(architecture: LlamaConfig, context: int) -> float:
    """One token of one row, with its logits."""
    logits = 2.0 * architecture.width * architecture.vocab_size
    dense = 2.0 * projection_parameters(architecture)
    return dense + logits + flops_of_attention(architecture, context)


def all_reduces_of_layer(*, backward: bool, remat: bool) -> int:
    """Of activations, of tensor parallelism (Shoeybi et al. 2019, arXiv 1909.08053): forward behind
    the attention's and the MLP's second product, backward before their first ones. A layer that is
    recomputed repeats the one between attention and MLP; nothing needs the other again."""
    return 2 + 2 * backward + (backward and remat)
