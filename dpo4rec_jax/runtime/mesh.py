"""The device mesh, and the one table that says how every parameter lies on it.

Axes: `data` splits the batch, `fsdp` splits the batch and the parameters, `tensor` splits heads,
hidden units and the vocabulary (Megatron's columns, then rows). A parameter without a rule stops
the program with the rule to add; nothing is sharded or replicated by default.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dpo4rec_jax.config import InputError

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))
MEMBERS = PartitionSpec(AXES)  # whole re-rankers in training, stacked: each device has its own

WHOLE = ()  # of any rank, a copy on every device

# (pattern of the whole path, axes of its dimensions). The leading None of `layers/` is the stack.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Policy
    (r"embed", ("tensor", "fsdp")),
    (r"unembed", ("fsdp", "tensor")),
    (r"final_norm", (None,)),
    (r"layers/(attention_norm|mlp_norm|q_norm|k_norm)", (None, None)),
    (r"layers/(q|k|v|gate|up)/kernel", (None, "fsdp", "tensor")),
    (r"layers/(q|k|v)/bias", (None, "tensor")),
    (r"layers/(o|down)/kernel", (None, "tensor", "fsdp")),
    (r"layers/o/bias", (None, None)),
    # Adapters
    (r"layers/(q|k|v|gate|up)/a", (None, "fsdp", None)),
    (r"layers/(q|k|v|gate|up)/b", (None, None, "tensor")),
    (r"layers/(o|down)/a", (None, "tensor", None)),
    (r"layers/(o|down)/b", (None, None, "fsdp")),
    # Encoder and re-rankers are small beside what they read: their batches are split, not they.
    (r"(bert|reranker)/.+", WHOLE),
)


def make_mesh(sizes: Mapping[Any, int], devices: list[Any] | None = None) -> Mesh:
    """A mesh over all devices (or the given ones); one of the sizes may be -1: what is left.

    Raises InputError where the sizes do not multiply to the number of devices, or do not let the
    slices lie along `data` and `fsdp`.
    """
    devices = jax.devices() if devices is None else devices
    shape = [sizes.get(axis, 1) for axis in AXES]
    given = math.prod(size for size in shape if size != -1)
    if shape.count(-1) == 1 and given > 0 and len(devices) % given == 0:
        shape[shape.index(-1)] = len(devices) // given
    if min(shape) < 1 or math.prod(shape) != len(devices):
        wanted = ", ".join(f"{axis}: {sizes.get(axis, 1)}" for axis in AXES)
        raise InputError(
            f"runtime.mesh: expected sizes that multiply to the {len(devices)} devices (one may "
            f"be -1), got {wanted}"
        )
    return Mesh(arranged(devices, (shape[0], shape[1], shape[2])), AXES)


def arranged(devices: list[Any], shape: tuple[int, int, int]) -> np.ndarray:
    """The devices in the order of a mesh of this shape.

    Slices, between which the slower data-centre network lies, follow each other along `data`, then
    `fsdp`, never along `tensor`. Within a slice TPUs lie as their torus suggests, others in the
    order given: `tensor`, the last axis, within a machine.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        along_data = math.gcd(shape[0], slices)
        along_fsdp = slices // along_data
        if shape[1] % along_fsdp:
            raise InputError(
                f"runtime.mesh: expected data x fsdp that divides into the {slices} slices, got "
                f"data: {shape[0]}, fsdp: {shape[1]}; make data a multiple of {slices}"
            )
        within = (shape[0] // along_data, shape[1] // along_fsdp, shape[2])
        return mesh_utils.create_hybrid_device_mesh(
            within, (along_data, along_fsdp, 1), devices, allow_split_physical_axes=True
        )
    if devices[0].platform == "tpu":
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return np.asarray(devices).reshape(shape)


def place(tree: Any, shardings: Any) -> Any:
    """Values, whole in every process, as arrays of these shardings, which may reach devices of
    other processes: each process keeps its part. An array that lies so already stays."""

    def placed(value: Any, sharding: Any) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(value, sharding)
        if isinstance(value, jax.Array) and value.sharding == sharding:
            return value
        host = np.asarray(value)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(placed, tree, shardings)


def on_host(tree: Any) -> Any:
    """Numpy copies of arrays, whole in every process; all processes must ask alike."""

    def copied(value: Any) -> np.ndarray:
        here = not isinstance(value, jax.Array) or value.is_fully_addressable
        if not (here or value.is_fully_replicated):
            sharding = value.sharding
            assert isinstance(sharding, NamedSharding)
            value = _whole(sharding.mesh)(value)
        return np.asarray(value)

    return jax.tree.map(copied, tree)


@functools.lru_cache(maxsize=8)
def _whole(mesh: Any) -> Any:
    return jax.jit(lambda value: value, out_shardings=NamedSharding(mesh, PartitionSpec()))


def sampling_mesh(sizes: Mapping[Any, int], devices: list[Any]) -> Mesh:
    """The mesh that one process samples on: rows are independent, so what is not `tensor` is data;
    fsdp would gather the weights for every token."""
    tensor = sizes.get("tensor", 1)
    return make_mesh({"data": 1 if tensor == -1 else -1, "tensor": tensor}, devices)


def spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The partition of one parameter; a dimension that its axis does not divide stays whole.

    Raises InputError for a path that no rule (or one of another rank) matches.
    """
    for pattern, axes in RULES:
        if not re.fullmatch(pattern, path):
            continue
        if axes == WHOLE:
            return PartitionSpec()
        if len(axes) == len(shape):
            sizes = [1 if axis is None else mesh.shape[axis] for axis in axes]
            return PartitionSpec(
                *(
                    axis if size % parts == 0 else None
                    for axis, size, parts in zip(axes, shape, sizes, strict=True)
                )
            )
    raise InputError(
        f"runtime/mesh.py: no sharding rule for parameter {path} {list(shape)}; add a line "
        f"(r{path!r}, (axis or None for each of its {len(shape)} dimensions)) to RULES"
    )


def shardings(tree: Any, mesh: Mesh | AbstractMesh, root: str = "") -> Any:
    """The sharding of every leaf (arrays or ShapeDtypeStructs) of a nested dict of parameters.

    `root` is what the rules call the tree: "" the policy and its adapters, "bert/", "reranker/".
    """

    def of_leaf(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, spec(root + "/".join(_names(path)), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def state_shardings(state: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The sharding of every leaf of a training state: moments and gradients lie as the parameter
    whose path theirs ends with, counters and sums whole on every device.

    Raises InputError for another leaf.
    """

    def of_leaf(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        if not leaf.shape:
            return NamedSharding(mesh, PartitionSpec())
        names = _names(path)
        ends = ["/".join(names[start:]) for start in range(len(names))]
        known = [end for end in ends if any(re.fullmatch(pattern, end) for pattern, _ in RULES)]
        return NamedSharding(mesh, spec(known[0] if known else ends[0], leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of_leaf, state)


def place_state(state: Any, mesh: Mesh | None) -> Any:
    """A training state as the rules say; as it is without a mesh."""
    return state if mesh is None else place(state, state_shardings(state, mesh))


def _names(path: tuple[Any, ...]) -> list[str]:
    """The parts of a leaf's path as words, of dicts, dataclasses and tuples."""
    return [str(getattr(part, "key", getattr(part, "name", part))) for part in path]
