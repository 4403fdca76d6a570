"""The device mesh, and the one table that says how every parameter lies on it.

Axes: `data` splits the batch, `fsdp` splits the batch and the parameters, `tensor` splits heads,
hidden units and the vocabulary (Megatron's columns, then rows). A parameter without a rule stops
the program with the rule to add; nothing is sharded or replicated by default.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dpo4rec_jax.config import InputError

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

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

    Raises InputError where the sizes do not multiply to the number of devices.
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
    return Mesh(np.asarray(devices).reshape(shape), AXES)


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
        name = root + "/".join(str(getattr(part, "key", part)) for part in path)
        return NamedSharding(mesh, spec(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)
