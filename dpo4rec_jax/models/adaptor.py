"""Adaptors from the encoder's space to the recommender's (KAR, arXiv 2306.10933, section 4.3).

Each works on user vectors and on item vectors, whatever their leading axes. `hybrid` mixes experts
shared by the two sides with experts dedicated to one, by a softmax gate on the input; `moe` has
one set of experts and one gate for both sides; `mlp` one expert and no gate.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

HIDDEN, OUT = 128, 32


class Experts(nn.Module):
    """`count` two-layer perceptrons (128, 32) on one input, mixed by the given weights.

    The output layer is linear (KAR's ends in a ReLU), so that mixing commutes with it and the whole
    mixture is two matrix products, whatever the number of experts; and a dead output cannot happen.
    """

    count: int

    @nn.compact
    def __call__(self, x: jax.Array, gate_E: jax.Array) -> jax.Array:
        hidden = nn.Dense(self.count * HIDDEN, name="hidden")(x)
        hidden = nn.relu(hidden).reshape(*x.shape[:-1], self.count, HIDDEN)
        mixed = (hidden * gate_E[..., None]).reshape(*x.shape[:-1], self.count * HIDDEN)
        init = nn.initializers.variance_scaling(float(self.count), "fan_in", "truncated_normal")
        out = nn.Dense(OUT, use_bias=False, kernel_init=init, name="out")(mixed)
        bias_EO = self.param("bias", nn.initializers.zeros_init(), (self.count, OUT))
        return out + gate_E @ bias_EO


class Hybrid(nn.Module):
    """Hybrid-expert adaptor: `shared` experts of both sides beside `dedicated` ones of each."""

    shared: int = 2
    dedicated: int = 5

    @nn.compact
    def __call__(self, x: jax.Array, side: str) -> jax.Array:
        gate_E = nn.softmax(nn.Dense(self.shared + self.dedicated, name=f"gate_{side}")(x))
        shared_E, own_E = gate_E[..., : self.shared], gate_E[..., self.shared :]
        shared = Experts(self.shared, name="shared")(x, shared_E)
        return shared + Experts(self.dedicated, name=side)(x, own_E)


class Moe(nn.Module):
    """One mixture of experts that serves both sides."""

    experts: int = 7

    @nn.compact
    def __call__(self, x: jax.Array, side: str) -> jax.Array:
        gate_E = nn.softmax(nn.Dense(self.experts, name="gate")(x))
        return Experts(self.experts, name="experts")(x, gate_E)


class Mlp(nn.Module):
    """One perceptron (128, 32) that serves both sides."""

    @nn.compact
    def __call__(self, x: jax.Array, side: str) -> jax.Array:
        gate_E = jnp.ones((*x.shape[:-1], 1), x.dtype)
        return Experts(1, name="expert")(x, gate_E)


ADAPTORS: dict[str, type[nn.Module]] = {"hybrid": Hybrid, "moe": Moe, "mlp": Mlp}
