"""Floating-point operations of HLO's matrix products."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

from dpo4rec_jax.rehearsal.hlo import Computation, Instruction


def flops_of_dot(computation: Computation, instruction: Instruction) -> float:
    left = computation.instructions[instruction.operands[0]].arrays[0]
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    contracted = [int(n) for n in found.group(1).split(",") if n] if found else []
    return 2.0 * instruction.arrays[0].elements * math.prod(left.sizes[i] for i in contracted)


def flops_of_convolution(computation: Computation, instruction: Instruction) -> float:
    """Products that meet padding or the holes of a dilation are not counted: TPUs write batched
    products as convolutions that consist mostly of those."""
    left, right = (computation.instructions[name].arrays[0] for name in instruction.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None
    lhs, rhs, out = labels.groups()
    window = _window(instruction.attributes)
    valid = 1
    for place, dim in enumerate(sorted(label for label in lhs if label.isdigit())):
        sizes = (left.sizes[lhs.index(dim)], instruction.arrays[0].sizes[out.index(dim)])
        valid *= _valid_products(*sizes, {name: each[place] for name, each in window.items()})
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    batch = instruction.arrays[0].sizes[out.index("b")]
    features = instruction.arrays[0].sizes[out.index("f")]
    taps = right.sizes[rhs.index("i")] / (int(groups.group(1)) if groups else 1)
    return 2.0 * batch * features * taps * valid


def _window(attributes: str) -> dict[str, list[tuple[int, ...]]]:
    """Size, stride, padding and dilations of each spatial dimension."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    if not found:
        return {"size": [], "stride": [], "pad": [], "lhs_dilate": [], "rhs_dilate": []}
    given = dict(part.split("=") for part in found.group(1).split())
    rank = len(given["size"].split("x"))
    defaults = {"stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}
    return {
        name: [
            tuple(int(number) for number in part.split("_"))
            for part in given.get(name, "x".join([default] * rank)).split("x")
        ]
        for name, default in {"size": "", **defaults}.items()
    }


def _valid_products(inputs: int, outputs: int, window: Mapping[str, tuple[int, ...]]) -> int:
    """Pairs of output position and kernel position that meet a real element of the input."""
    (size,), (stride,), (low, _) = window["size"], window["stride"], window["pad"]
    (dilation,), (spread,) = window["lhs_dilate"], window["rhs_dilate"]
    at = np.arange(outputs)[:, None] * stride + np.arange(size)[None] * spread - low
    inside = (at >= 0) & (at <= (inputs - 1) * dilation) & (at % dilation == 0)
    return int(inside.sum())
