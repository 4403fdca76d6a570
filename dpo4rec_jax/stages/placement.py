"""How everything that trains lies on the mesh, as `--dry-run` prints it: one line a parameter."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from dpo4rec_jax.config import AlignConfig
from dpo4rec_jax.models import lora
from dpo4rec_jax.models.llama import LlamaConfig
from dpo4rec_jax.runtime.mesh import BATCH, shardings
from dpo4rec_jax.weights.policy import shapes

MOMENTS = 2  # of AdamW, each float32 and lying as its parameter


def table(architecture: LlamaConfig, align: AlignConfig, mesh: Mesh | AbstractMesh) -> list[str]:
    """Path, shape, sharding and bytes a device of every parameter of policy and adapter, and the
    sums of what alignment keeps beside them."""
    head = ("parameter", "shape", "sharding", "bytes a device")
    policy = _rows(shapes(architecture), mesh)
    moving = policy
    rows = list(policy)
    if align.method == "lora":
        init = functools.partial(lora.init, architecture, align.lora)
        moving = _rows(jax.eval_shape(init, jax.random.key(0)), mesh, "adapter/")
        rows += moving
    state = sum(values for *_, values in moving) * 4 * MOMENTS
    whole = [(path, shape, where, f"{size:,}") for path, shape, where, size, _ in rows]
    widths = [max(len(row[column]) for row in (head, *whole)) for column in range(3)]
    lines = [
        "  " + "  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3].rjust(14)])
        for row in (head, *whole)
    ]
    total = sum(row[3] for row in rows)
    batch = ", ".join(str(axis) for axis in BATCH[0])
    return [
        *lines,
        f"  all of them: {total:,} bytes a device; moments of what moves, which lie as it does: "
        f"{state:,}",
        f"  rows of prompts, completions and activations are split over {batch}",
    ]


def _rows(
    tree: Any, mesh: Mesh | AbstractMesh, prefix: str = ""
) -> list[tuple[str, str, str, int, int]]:
    """Path, shape, sharding, and bytes and values a device."""
    rows = []
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, leaf), where in zip(leaves, jax.tree.leaves(shardings(tree, mesh)), strict=True):
        values = math.prod(where.shard_shape(leaf.shape))
        name = prefix + "/".join(str(part.key) for part in path)
        shape = f"{leaf.dtype.name}[{', '.join(map(str, leaf.shape))}]"
        axes = ", ".join("-" if axis is None else str(axis) for axis in where.spec) or "whole"
        rows.append((name, shape, axes, values * leaf.dtype.itemsize, values))
    return rows
