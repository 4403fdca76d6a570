"""The machine's own peaks, measured: what a perfect program could do here and now."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dpo4rec_jax.config import Config
from dpo4rec_jax.weights.policy import resolve_dtypes

# On CPU, and larger elsewhere, where a call itself takes a tenth of a millisecond.
MATRIX, LARGE_MATRIX = {"cpu": 1536}, 8192  # rows and columns of the product that is timed
COPY_BYTES, LARGE_COPY_BYTES = {"cpu": 2**28}, 2**32


@dataclass(frozen=True)
class Machine:
    """One device of it."""

    device: str
    devices: int
    jax: str
    python: str
    dtype: str
    flops_per_second: float  # of a large matrix product in the compute dtype
    bytes_per_second: float  # read and written over a large array

    def floor(self, flops: int, bytes_moved: int) -> float:
        """Seconds below which no program gets: the slower of computing and moving."""
        return max(flops / self.flops_per_second, bytes_moved / self.bytes_per_second)


def seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Median time of a call, its results waited for; call once before, to compile."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure_machine(config: Config) -> Machine:
    dtype = resolve_dtypes(config.policy.dtype, None)[0]
    size = MATRIX.get(jax.default_backend(), LARGE_MATRIX)
    copied = COPY_BYTES.get(jax.default_backend(), LARGE_COPY_BYTES)
    # Not ones: a GPU draws less power for them, and is faster.
    square = jax.random.normal(jax.random.key(0), (size, size), dtype)
    multiply = jax.jit(lambda x: jnp.dot(x, x, precision="highest" if dtype == "float32" else None))
    # In place: of a fresh result the time would be that of mapping its pages.
    rewrite = jax.jit(lambda x: x + 1, donate_argnums=0)
    held = [rewrite(jnp.ones(copied // 4, jnp.float32))]
    jax.block_until_ready((multiply(square), held))  # compiled

    def copy() -> jax.Array:
        held[0] = rewrite(held[0])
        return held[0]

    return Machine(
        device=jax.devices()[0].device_kind,
        devices=jax.device_count(),
        jax=jax.__version__,
        python=platform.python_version(),
        dtype=dtype,
        flops_per_second=2 * size**3 / seconds(lambda: multiply(square), repeats=9),
        bytes_per_second=2 * copied / seconds(copy),
    )
