"""Checkpoint tensors onto devices, one at a time, straight into their sharding.

A stacked parameter is allocated where it will live and filled layer by layer in place; each device
gets only its own slice of each tensor. The host holds one tensor at a time. Parameters too small
for that to matter are assembled on the host, which spares the compilation.
"""

from __future__ import annotations

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
    return params


def _at(tree: Any, path: Path) -> Any:
    for part in path:
        tree = tree[part]
    return tree


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
    """One parameter under construction: a buffer for each device that will hold part of it."""

    def __init__(self, shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding):
        self.shape, self.sharding, self.dtype = shape.shape, sharding, shape.dtype
        self.index_of = sharding.addressable_devices_indices_map(shape.shape)
        self.buffers: dict[Any, jax.Array] = {}

    def put(self, stored: np.ndarray, slot: Slot) -> bool:
        """Writes a stored tensor into its place on every device; False if it is not finite."""
        finite = []
        slices: dict[str, np.ndarray] = {}
        for device, index in self.index_of.items():
            assert index is not None
            part = tuple(index) if slot.layer is None else tuple(index[1:])
            part = part[::-1] if slot.transpose else part
            if str(part) not in slices:  # replicas share one read
                slices[str(part)] = np.array(stored[part])
            raw = jax.device_put(slices[str(part)], device)
            if slot.layer is None:
                self.buffers[device], is_finite = _convert(raw, slot.transpose, self.dtype)
            else:
                stack = self.buffers.pop(device, None)
                if stack is None:
                    shape = self.sharding.shard_shape(self.shape)
                    stack = jnp.zeros(shape, self.dtype, device=device)
                self.buffers[device], is_finite = _place(stack, raw, slot.layer, slot.transpose)
            finite.append(is_finite)
        return all(bool(flag) for flag in finite)  # waits: one tensor in flight bounds the host

    def array(self) -> jax.Array:
        buffers = list(self.buffers.values())
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, buffers)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _convert(raw: jax.Array, transpose: bool, dtype: Any) -> tuple[jax.Array, jax.Array]:
    value = (raw.T if transpose else raw).astype(dtype)
    return value, jnp.isfinite(value).all()


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _place(
    stack: jax.Array, raw: jax.Array, layer: int | jax.Array, transpose: bool
) -> tuple[jax.Array, jax.Array]:
    value, finite = _convert(raw, transpose, stack.dtype)
    return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0), finite
