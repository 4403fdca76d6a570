"""Checkpoint tensors onto devices, one at a time, straight into their sharding.

A stacked parameter is allocated where it will live and filled layer by layer in place; each device
gets only its own slice of each tensor. The host holds one tensor at a time. Parameters too small
for that to matter are assembled on the host, which spares the compilation.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo4rec_jax.config import InputError

Path = tuple[str, ...]
HOST_BYTES = 16 * 2**20  # parameters up to this size are assembled on the host


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint that has not been read yet; `read` may map the file."""

    file: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a stored tensor goes: a path of the parameter tree, and its layer if it is stacked."""

    path: Path
    shape: tuple[int, ...]  # as stored
    layer: int | None = None
    transpose: bool = False  # HF keeps [out, in], we multiply by [in, out]


def check_keys(slots: Mapping[str, Slot], tensors: Mapping[str, StoredTensor], source: str) -> None:
    """Raises InputError unless names and shapes agree one to one."""
    missing = [name for name in slots if name not in tensors]
    if missing:
        raise InputError(
            f"{source}: {missing[0]}: expected {list(slots[missing[0]].shape)}, got no such tensor"
            f"{_others(missing)}; is a shard missing, or is this another model's config?"
        )
    unknown = [name for name in tensors if name not in slots]
    if unknown:
        raise InputError(
            f"{tensors[unknown[0]].file}: {unknown[0]}: expected no such tensor in this "
            f"architecture, got {list(tensors[unknown[0]].shape)}{_others(unknown)}"
        )
    for name, slot in slots.items():
        if tensors[name].shape != slot.shape:
            raise InputError(
                f"{tensors[name].file}: {name}: expected {list(slot.shape)}, got "
                f"{list(tensors[name].shape)}; config.json and weights do not belong together"
            )


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def stream(
    slots: Mapping[str, Slot],
    tensors: Mapping[str, StoredTensor],
    shapes: Mapping[str, Any],
    shardings: Any,
) -> dict[str, Any]:
    """The parameter tree of `shapes` (of ShapeDtypeStructs), filled, each leaf in its sharding.

    Raises InputError naming a tensor that holds NaN or infinity.
    """
    by_path: dict[Path, list[str]] = {}
    for name, slot in slots.items():
        by_path.setdefault(slot.path, []).append(name)
    params: dict[str, Any] = {}
    for path, names in by_path.items():
        shape, sharding = _at(shapes, path), _at(shardings, path)
        small = math.prod(shape.shape) * shape.dtype.itemsize <= HOST_BYTES
        leaf = (_HostLeaf if small else _DeviceLeaf)(shape, sharding)
        for name in names:
            if not leaf.put(tensors[name].read(), slots[name]):
                raise InputError(
                    f"{tensors[name].file}: {name}: expected finite numbers, got NaN or infinity; "
                    "the file is damaged or its training diverged"
                )
        inner = params
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
        inner[path[-1]] = leaf.array()
        if not small:
            _return_freed_memory()
    return params


def _at(tree: Any, path: Path) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def _return_freed_memory() -> None:
    """glibc keeps freed slices for itself, up to a tenth of the checkpoint; others do not."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class _HostLeaf:
    """One small parameter under construction, in numpy."""

    def __init__(self, shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding):
        self.value, self.sharding = np.empty(shape.shape, shape.dtype), sharding

    def put(self, stored: np.ndarray, slot: Slot) -> bool:
        """Writes a stored tensor into its place; False if it is not finite."""
        place = self.value if slot.layer is None else self.value[slot.layer]
        place[...] = stored.T if slot.transpose else stored
        return bool(np.isfinite(place).all())

    def array(self) -> jax.Array:
        return jax.make_array_from_callback(
            self.value.shape, self.sharding, lambda index: self.value[index]
        )


class _DeviceLeaf:
    """One parameter under construction where it will live."""

    def __init__(self, shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding):
        self.shape, self.sharding = shape, sharding
        self.value: jax.Array | None = None

    def put(self, stored: np.ndarray, slot: Slot) -> bool:
        """Writes a stored tensor into its place; False if it is not finite."""
        raw = jax.make_array_from_callback(
            stored.shape,
            _stored_sharding(self.sharding, slot),
            lambda index: np.array(stored[index]),  # not a view: the file may change later
        )
        if slot.layer is None and not slot.transpose and raw.dtype == self.shape.dtype:
            self.value, finite = raw, _finite(raw)
        elif slot.layer is None:
            self.value, finite = _convert(raw, slot.transpose, self.shape.dtype, self.sharding)
        else:
            if self.value is None:
                self.value = jnp.zeros(self.shape.shape, self.shape.dtype, device=self.sharding)
            self.value, finite = _place(self.value, raw, slot.layer, slot.transpose, self.sharding)
        return bool(finite)  # waits: one tensor in flight bounds what the host holds

    def array(self) -> jax.Array:
        assert self.value is not None
        return self.value


def _stored_sharding(sharding: jax.sharding.Sharding, slot: Slot) -> jax.sharding.Sharding:
    """How a stored tensor must lie so that each device already has what it will keep."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    axes = tuple(sharding.spec)
    axes = axes if slot.layer is None else axes[1:]
    axes += (None,) * (len(slot.shape) - len(axes))
    axes = axes[::-1] if slot.transpose else axes
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*axes))


@jax.jit
def _finite(value: jax.Array) -> jax.Array:
    return jnp.isfinite(value).all()


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _convert(
    raw: jax.Array, transpose: bool, dtype: Any, sharding: Any
) -> tuple[jax.Array, jax.Array]:
    value = (raw.T if transpose else raw).astype(dtype)
    return jax.lax.with_sharding_constraint(value, sharding), jnp.isfinite(value).all()


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _place(
    stack: jax.Array, raw: jax.Array, layer: int | jax.Array, transpose: bool, sharding: Any
) -> tuple[jax.Array, jax.Array]:
    value = (raw.T if transpose else raw).astype(stack.dtype)
    stack = jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)
    return jax.lax.with_sharding_constraint(stack, sharding), jnp.isfinite(value).all()
