"""The optimiser of every training loop: clip, AdamW, warm-up and decay, from optax."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

Decay = Literal["cosine", "linear", "constant"]

NEVER_DECAYED = ("norm", "bias", "embed")


def learning_rate_schedule(
    peak: float, steps: int, *, warmup_fraction: float = 0.1, decay: Decay = "cosine"
) -> optax.Schedule:
    """Rises linearly over the first share of the steps, then falls to 0 at the last one.

    A raising phase takes at least one whole step from `peak / warmup steps`, never a step at 0.
    """
    raising = min(round(steps * warmup_fraction), steps - 1)
    falling = steps - raising
    shape = {
        "cosine": optax.cosine_decay_schedule(peak, falling),
        "linear": optax.linear_schedule(peak, 0.0, falling),
        "constant": optax.constant_schedule(peak),
    }[decay]
    if raising == 0:
        return shape
    raise_up = optax.linear_schedule(peak / (raising + 1), peak, raising)
    return optax.join_schedules([raise_up, shape], [raising])


def decayed(params: Any) -> Any:
    """True for the leaves that weight decay shrinks: matrices of layers and adapters.

    Told by name: with layers stacked on axis 0, a norm's scale has two axes like a matrix.
    """

    def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
        names = [str(getattr(part, "key", part)) for part in path]
        return leaf.ndim >= 2 and not any(tag in name for name in names for tag in NEVER_DECAYED)

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def adamw(
    schedule: optax.Schedule,
    *,
    max_grad_norm: float,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) on gradients clipped to a global norm, which `update` may be
    given as `global_norm`."""
    return optax.chain(
        _clip(max_grad_norm),
        optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed),
    )


def _clip(most: float) -> optax.GradientTransformationExtraArgs:
    """optax.clip_by_global_norm for callers that know the norm: taken here again, of gradients that
    were scaled meanwhile, it would have them written to memory first."""

    def update(
        updates: Any, state: Any, params: Any = None, *, global_norm: Any = None, **_: Any
    ) -> tuple[Any, Any]:
        norm = optax.tree.norm(updates) if global_norm is None else global_norm
        scale = most / jnp.maximum(norm, most)
        return jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
