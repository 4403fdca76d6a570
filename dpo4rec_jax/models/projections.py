"""Projections of one input: weights by column or by row, biases, adapters, and one sum over
`tensor` of the gradient of what they share."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from dpo4rec_jax.config import LoraConfig
from dpo4rec_jax.products import product, times_rows

INIT_DEVIATION = 0.02
PRODUCT = "projection"  # the name of a projection's product, for rematerialisation policies


@runtime_checkable
class Numerics(Protocol):
    """What a projection needs of a decoder's config."""

    @property
    def param_dtype(self) -> str: ...


class Projection(nn.Module):
    """x W + b, plus the low-rank (alpha / rank) dropout(x) A B of an adapter when one is given."""

    config: Numerics
    shape: tuple[int, int]
    use_bias: bool = False
    by_row: bool = False  # the weights lie as `llama.split_layers` leaves them
    lora_config: LoraConfig | None = None
    dropout: bool = False

    def setup(self) -> None:
        normal, dtype = nn.initializers.normal(INIT_DEVIATION), self.config.param_dtype
        if self.by_row:
            self.kernel_rows = self.param("kernel_rows", normal, self.shape[::-1], dtype)
        else:
            self.kernel = self.param("kernel", normal, self.shape, dtype)
        if self.use_bias:
            self.bias = self.param("bias", nn.initializers.zeros, self.shape[1:], dtype)
        if self.lora_config is not None:
            self.drop = nn.Dropout(self.lora_config.dropout, deterministic=not self.dropout)

    def __call__(self, x_BTD: Array, y_BTO: Array, lora: Mapping[str, Array] | None) -> Array:
        """`y_BTO` is x W, which `products` forms for all projections of an input together."""
        if self.use_bias:
            y_BTO += jnp.broadcast_to(self.bias.astype(x_BTD.dtype), y_BTO.shape)
        if lora is None:
            return y_BTO
        assert self.lora_config is not None, "lora parameters come with their LoraConfig"
        down_BTR = _dot(self.drop(x_BTD), lora["a"].astype(x_BTD.dtype))
        # The scale where the array is smallest, forward and backward.
        down_BTR *= self.lora_config.alpha / lora["a"].shape[-1]
        return y_BTO + _dot(down_BTR, lora["b"].astype(x_BTD.dtype))


def products(projections: list[Projection], x_BTD: Array, mesh: Mesh | None) -> tuple[Array, ...]:
    """x W of each, in the dtype of x."""
    if projections[0].by_row:
        return times_rows(x_BTD, *(each.kernel_rows.astype(x_BTD.dtype) for each in projections))
    kernels = tuple(each.kernel.astype(x_BTD.dtype) for each in projections)
    formed = _dots(mesh, x_BTD, kernels)
    return jax.tree.map(lambda y_BTO: checkpoint_name(y_BTO, PRODUCT), formed)


def _dot(x_xD: Array, kernel_DO: Array) -> Array:
    (y_xO,) = jax.tree.leaves(_dots(None, x_xD, (kernel_DO,)))
    return y_xO


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dots(mesh: Mesh | None, x_xD: Array, kernels: tuple[Array, ...]) -> tuple[Array, ...]:
    """x W for each W. The gradient of x is summed over `tensor` once: left to itself XLA sums that
    of each product (all three of q, k and v), and adds them up behind it.

    The gradient of W is formed so that the narrower factor is the one that a backend may have to
    transpose: on CPU that copy, of a wide activation, cost a sixth of a training step."""
    return tuple(product("...d,do->...o", x_xD, kernel_DO) for kernel_DO in kernels)


def _dots_forward(
    mesh: Mesh | None, x_xD: Array, kernels: tuple[Array, ...]
) -> tuple[tuple[Array, ...], Any]:
    return _dots(mesh, x_xD, kernels), (x_xD, kernels)


def _dots_backward(
    mesh: Mesh | None, kept: tuple[Array, tuple[Array, ...]], by_ys: tuple[Array, ...]
) -> tuple[Array, tuple[Array, ...]]:
    x_xD, kernels = kept

    def by_input(by_ys: tuple[Array, ...], kernels: tuple[Array, ...]) -> Array:
        parts = zip(by_ys, kernels, strict=True)
        by_x = [product("...o,do->...d", *part) for part in parts]
        return functools.reduce(jnp.add, by_x)

    def summed(by_ys: tuple[Array, ...], kernels: tuple[Array, ...]) -> Array:
        return jax.lax.psum(by_input(by_ys, kernels), "tensor")

    by_x_of = by_input
    if len(kernels) > 1 and mesh is not None and mesh.shape["tensor"] > 1:
        columns = PartitionSpec(*(None,) * (x_xD.ndim - 1), "tensor")
        specs = (columns, PartitionSpec(None, "tensor"))
        by_x_of = jax.shard_map(
            summed, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), axis_names={"tensor"}
        )
    by_kernels = []
    for by_y_xO, kernel_DO in zip(by_ys, kernels, strict=True):
        if kernel_DO.shape[0] <= kernel_DO.shape[1]:
            by_kernel_DO = product("...d,...o->do", x_xD, by_y_xO)
        else:
            by_kernel_DO = product("...o,...d->od", by_y_xO, x_xD).T
        by_kernels.append(by_kernel_DO)
    return by_x_of(by_ys, kernels), tuple(by_kernels)


_dots.defvjp(_dots_forward, _dots_backward)
