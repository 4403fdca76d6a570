"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864): plain, linear, llama3 scaled."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dpo4rec_jax.products import summed


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Stretching of the rotary frequencies: `linear` (all alike) or `llama3` (long waves only)."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians a position for each of the head_dim / 2 pairs, float32.

    Computed on the host in HF's order of float32 operations: at position 8,192 one more rounding
    of a frequency is already 5e-4 radians. `llama3` as in `transformers`' modeling_rope_utils.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    power = np.power(np.float64(theta), exponent.astype(np.float64))
    frequency = np.float32(1.0) / power.astype(np.float32)
    if scaling is None:
        return frequency
    stretched = frequency / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return stretched
    wavelength = np.float32(2 * np.pi) / frequency
    original = np.float32(scaling.original_max_position)
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    blend = (original / wavelength - low) / (high - low)
    blended = (1 - blend) * frequency / np.float32(scaling.factor) + blend * frequency
    result = np.where(wavelength > original / low, stretched, frequency)
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return np.where(between, blended, result).astype(np.float32)


def turns(position_BT: Array, frequency_d: np.ndarray) -> tuple[Array, Array]:
    """Cosine and sine of every position's angles, B T d float32."""
    angle_BTd = position_BT[..., None].astype(jnp.float32) * frequency_d[None, None]
    return _once(jnp.cos(angle_BTd)), _once(jnp.sin(angle_BTd))


def _once(x_BTd: Array) -> Array:
    """The same array. XLA for CPUs fuses what is elementwise into each of its uses, and would take
    the cosines anew for every head of every layer; it does not fuse a product."""

    def times_one(x_BTd: Array) -> Array:
        return summed("btd,de->bte", x_BTd, jnp.eye(x_BTd.shape[-1], dtype=x_BTd.dtype))

    return jax.lax.platform_dependent(x_BTd, cpu=times_one, default=lambda x_BTd: x_BTd)


def rotate(x_BTHd: Array, cos_BTd: Array, sin_BTd: Array) -> Array:
    """Rotary embedding in the half-split layout of HF checkpoints, in float32, cast back."""
    first, second = jnp.split(x_BTHd.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTd[:, :, None], sin_BTd[:, :, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTHd.dtype)
