"""DLCM (Ai et al. 2018, arXiv 1804.05936): a GRU reads the list, then scores each state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dpo4rec_jax.models.list_attention import LayerNorm, dropout


class GRU(nn.Module):
    """A gated recurrent unit in PyTorch's parametrisation; padding leaves the state as it is.

    All input projections are one matrix product before the scan. The biases of the update gate
    begin spread over +-3, so that some of the state remembers the list and some shows the candidate
    just read (for a state that does both, a fresh one takes epochs to tell them apart). Candidates
    come first, as the scan reads them; returned are the state after every one and the last state,
    of the last of `readings`, each of which goes on from where the one before ended.
    """

    width: int
    readings: int = 1

    @nn.compact
    def __call__(self, x_NBD: jax.Array, mask_NB: jax.Array) -> tuple[jax.Array, jax.Array]:
        gates_NBG = nn.Dense(3 * self.width, bias_init=_spread_update, name="input")(x_NBD)
        recurrent = self.param(
            "recurrent", nn.initializers.orthogonal(), (self.width, 3 * self.width)
        )
        new_bias = self.param("new_bias", nn.initializers.zeros_init(), (self.width,))

        def step(state_BH, now):
            gates_BG, mask_B = now
            reset, update, new = jnp.split(gates_BG, 3, axis=-1)
            past_reset, past_update, past_new = jnp.split(state_BH @ recurrent, 3, axis=-1)
            reset = nn.sigmoid(reset + past_reset)
            update = nn.sigmoid(update + past_update)
            past_new = past_new + jnp.broadcast_to(new_bias, past_new.shape)
            candidate = jnp.tanh(new + reset * past_new)
            moved_BH = (1.0 - update) * candidate + update * state_BH
            state_BH = jnp.where(mask_B[:, None], moved_BH, state_BH)
            return state_BH, state_BH

        start_BH = jnp.zeros((x_NBD.shape[1], self.width), x_NBD.dtype)
        last_BH, state_NBH = jax.lax.scan(step, start_BH, (gates_NBG, mask_NB))
        for _ in range(1, self.readings):
            last_BH, state_NBH = jax.lax.scan(step, last_BH, (gates_NBG, mask_NB))
        return state_NBH, last_BH


def _spread_update(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Biases of (reset, update, new) gates."""
    del key
    width = shape[0] // 3
    zeros = jnp.zeros(width, dtype)
    return jnp.concatenate([zeros, jnp.linspace(-3.0, 3.0, width, dtype=dtype), zeros])


class DLCM(nn.Module):
    """Score of candidate i: v . (o_i * tanh(W s + b)), o_i its state, s the last (equation 6).

    The paper reads from the worst candidate of a first ranking to the best. Lists here come in any
    order, so they are read twice: what the second reading finds first is met by the whole list.
    """

    dropout: float = 0.0
    width: int = 128
    readings: int = 2

    @nn.compact
    def __call__(self, x_BND: jax.Array, mask_BN: jax.Array, training: bool) -> jax.Array:
        # Candidates first from here on: the states are never transposed, and what is summed over a
        # list is a product of whole states (`each_times`).
        x_NBD = LayerNorm()(x_BND.swapaxes(0, 1))
        state_NBH, last_BH = GRU(self.width, self.readings, name="gru")(x_NBD, mask_BN.T)
        local_NBH = dropout(self.dropout, training, candidates=0)(state_NBH)
        context_BH = jnp.tanh(nn.Dense(self.width, name="context")(last_BH))
        scored_NBH: Any = each_times(local_NBH, context_BH)
        return nn.Dense(1, name="score")(scored_NBH)[..., 0].T


@jax.custom_vjp
def each_times(local_NBH: jax.Array, context_BH: jax.Array) -> jax.Array:
    """Every candidate's state by its list's context. The gradient's sum over candidates is a
    product with ones: XLA's reductions of a leading axis took a seventh of a CPU's epoch."""
    return local_NBH * context_BH[None]


def _each_times_forward(local_NBH: jax.Array, context_BH: jax.Array) -> tuple[jax.Array, Any]:
    return local_NBH * context_BH[None], (local_NBH, context_BH)


def _each_times_backward(kept: Any, by_NBH: jax.Array) -> tuple[jax.Array, jax.Array]:
    local_NBH, context_BH = kept
    ones_N = jnp.ones(len(local_NBH), by_NBH.dtype)
    by_context = ones_N @ (by_NBH * local_NBH).reshape(len(ones_N), -1)
    return by_NBH * context_BH[None], by_context.reshape(context_BH.shape)


each_times.defvjp(_each_times_forward, _each_times_backward)
