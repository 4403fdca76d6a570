"""Matrix products, summed in float32, in the form that each backend computes fast.

float32 factors are multiplied as float32: accelerators would otherwise take TF32 or bfloat16. Of
bfloat16 factors a CPU has units that give float32 sums, which XLA uses only where float32 is what
is asked for, and the operands are plain matrices; asked for bfloat16 it multiplies a quarter as
fast or converts the factors to float32 first.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

Einsum = Callable[[str, Array, Array], Array]
FEW = 64  # rows that a CPU multiplies faster as the right factor, transposed, than as the left


def summed(spec: str, left: Array, right: Array) -> Array:
    """An einsum of two factors, float32 whatever they are."""
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jnp.einsum(spec, left, right, precision=precision, preferred_element_type=jnp.float32)


def product(spec: str, left: Array, right: Array) -> Array:
    """An einsum in which `...` are leading axes, in the dtype of the factors."""
    if left.dtype == jnp.float32:
        return summed(spec, left, right)

    def in_dtype(left: Array, right: Array) -> Array:
        return jnp.einsum(spec, left, right)

    def rounded(left: Array, right: Array) -> Array:
        inputs, output = spec.split("->")
        matrices = [
            x.reshape(-1, x.shape[-1]) if axes.startswith("...") else x
            for axes, x in zip(inputs.split(","), (left, right), strict=True)
        ]
        out = summed(spec.replace("...", "n"), *matrices).astype(left.dtype)
        return out.reshape(*left.shape[:-1], -1) if output.startswith("...") else out

    return jax.lax.platform_dependent(left, right, cpu=rounded, default=in_dtype)


def times_rows(x: Array, *matrices: Array, form: Einsum = product) -> tuple[Array, ...]:
    """x M^T in the dtype of `form` (`product` or `summed`), for matrices that lie by rows: each row
    is what x, which may have leading axes, is multiplied by.

    Few rows of float32 on a CPU are multiplied as M x^T: XLA packs the right factor for every
    product, and x is small to pack. With 32 rows that takes 0.7 of the time. The barriers keep the
    transpositions out of the products, which read transposed factors slowly.
    """

    def as_left(x: Array, *matrices: Array) -> tuple[Array, ...]:
        return tuple(form("...d,od->...o", x, matrix) for matrix in matrices)

    def as_right(x: Array, *matrices: Array) -> tuple[Array, ...]:
        turned = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
        formed = (summed("od,dn->on", matrix, turned) for matrix in matrices)
        return tuple(
            jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], len(y)) for y in formed
        )

    if x.dtype != jnp.float32 or math.prod(x.shape[:-1]) > FEW:
        return as_left(x, *matrices)
    return jax.lax.platform_dependent(x, *matrices, cpu=as_right, default=as_left)
