"""What a compiled program does: products, traffic with memory, collectives.

XLA's own cost analysis counts the body of a loop once, and knows nothing of what a collective
moves. Here every instruction counts as often as the loops around it turn. The layers of a policy
are such a loop; a loop whose turns depend on data counts once and is named in `Costs.unknown`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Hashable, Iterable

import numpy as np

from dpo4rec_jax.rehearsal.hlo import Array, Computation, Instruction, Module
from dpo4rec_jax.rehearsal.products import flops_of_convolution, flops_of_dot

COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
# Names for values that are there already, or ends of what was counted at its start.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "partition-id"),
    *("replica-id", "after-all", "opt-barrier", "domain", "add-dependency", "copy-done"),
    *("async-done", "async-update", "send-done", "recv-done", "while", "conditional", "call"),
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """Equal collectives of a program. `bytes` is one's whole array, as it is before a
    reduce-scatter or after an all-gather; `groups` are positions in the mesh's list of devices."""

    kind: str
    arrays: tuple[str, ...]
    bytes: float
    groups: tuple[tuple[int, ...], ...]
    origin: str
    times: float
    channel: str = ""

    @property
    def identity(self) -> Hashable:
        """TPUs carry one collective through several fusions, under one channel; those that a
        program writes itself (`psum`) all have the same, so that their origin tells them apart."""
        return self.channel and (self.channel, self.arrays, self.groups, self.origin)

    @property
    def group_size(self) -> int:
        return max(map(len, self.groups), default=1)


@dataclasses.dataclass
class Costs:
    """Of one device: floating-point operations of matrix products, bytes to and from HBM."""

    flops: float = 0.0
    bytes: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    kernels: dict[str, float] = dataclasses.field(default_factory=dict)  # custom calls, times
    unknown: set[str] = dataclasses.field(default_factory=set)  # loops counted once

    def add(self, other: Costs) -> None:
        self.flops += other.flops
        self.bytes += other.bytes
        self.collectives += other.collectives
        self.unknown |= other.unknown
        for name, times in other.kernels.items():
            self.kernels[name] = self.kernels.get(name, 0.0) + times


def costs_of(module: Module) -> Costs:
    """Everything one device does in one call of the program."""
    return _Walk(module).of(module.entry, 1.0, in_memory=True)


class _Walk:
    def __init__(self, module: Module):
        self._module = module
        self._read = functools.cache(self._bytes_read)
        self._written = functools.cache(self._bytes_written)

    def of(self, name: str, times: float, in_memory: bool) -> Costs:
        """Costs of a computation; inside a fusion nothing goes through memory."""
        total = Costs()
        computation = self._module.computations[name]
        for instruction in computation.instructions.values():
            self._count(total, computation, instruction, times, in_memory)
        named = {each.identity or i: each for i, each in enumerate(total.collectives)}
        total.collectives = list(named.values())
        return total

    def _count(
        self,
        total: Costs,
        computation: Computation,
        instruction: Instruction,
        times: float,
        in_memory: bool,
    ) -> None:
        opcode = instruction.opcode
        if opcode == "while":
            trips = trip_count(self._module, computation, instruction)
            if trips is None:
                total.unknown.add(instruction.origin)
            body = instruction.attribute("body")
            assert body is not None
            total.add(self.of(body, times * (1 if trips is None else trips), in_memory))
        elif opcode == "conditional":
            branches = [self.of(name, times, in_memory) for name in _branches(instruction)]
            total.add(max(branches, key=lambda branch: (branch.bytes, branch.flops)))
        elif opcode in ("call", "async-start", "fusion"):
            called = instruction.attribute("calls") or instruction.attribute("to_apply")
            assert called is not None
            inner = self.of(called, times, in_memory and opcode != "fusion")
            if _is_scatter(called):
                inner.collectives = [
                    dataclasses.replace(each, kind="reduce-scatter") for each in inner.collectives
                ]
            total.add(inner)
        elif opcode.removesuffix("-start") in COLLECTIVES:
            total.collectives.append(_collective(computation, instruction, times))
        elif opcode == "dot":
            total.flops += times * flops_of_dot(computation, instruction)
        elif opcode == "convolution":
            total.flops += times * flops_of_convolution(computation, instruction)
        elif opcode == "custom-call":
            found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
            target = found.group(1) if found else "?"
            total.kernels[target] = total.kernels.get(target, 0.0) + times
            total.flops += times * _flops_declared(instruction)
        if in_memory and opcode not in _FREE and not opcode.endswith("-done"):
            total.bytes += times * self._bytes_moved(computation, instruction)

    def _bytes_moved(self, computation: Computation, instruction: Instruction) -> float:
        """Between HBM and the chip, by one instruction that runs by itself."""
        if instruction.opcode == "async-start":
            return 0.0  # its computation is counted
        operands = [computation.instructions[name] for name in instruction.operands]
        if instruction.opcode == "fusion":
            called = instruction.attribute("calls")
            assert called is not None
            read = math.fsum(
                self._read(called, index)
                for index, operand in enumerate(operands)
                if not _near(operand)
            )
            return read + self._written(called, tuple(a.near for a in instruction.arrays))
        if instruction.opcode in ("dynamic-slice", "gather", "slice"):
            return 2 * _bytes(instruction.arrays)
        if instruction.opcode in ("dynamic-update-slice", "scatter"):
            return 2 * _bytes(operands[-1 if instruction.opcode == "scatter" else 1].arrays)
        if instruction.opcode == "slice-start":
            result = instruction.arrays[1]
            return result.bytes * (1 if result.near else 2)
        if instruction.opcode == "copy-start":
            source, target = instruction.arrays[1], instruction.arrays[0]
            return math.fsum(array.bytes for array in (source, target) if not array.near)
        return _bytes(instruction.arrays) + math.fsum(
            _bytes(operand.arrays) for operand in operands
        )

    def _bytes_read(self, called: str, index: int) -> float:
        """Of a fusion's operand: of what is only sliced, the slices."""
        computation = self._module.computations[called]
        parameter = computation.parameter(index)
        return 0.0 if parameter is None else self._bytes_used(called, parameter)

    def _bytes_used(self, called: str, value: Instruction) -> float:
        computation = self._module.computations[called]
        whole = math.fsum(array.bytes for array in value.arrays)
        used = 0.0
        for user in computation.users(value.name):
            if user.opcode in ("bitcast", "reshape", "transpose", "copy"):
                used += self._bytes_used(called, user)
            elif user.opcode in ("dynamic-slice", "slice", "gather"):
                used += math.fsum(array.bytes for array in user.arrays)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
                continue  # updated in place
            elif user.opcode in (*COLLECTIVES, "custom-call", "tuple"):
                continue  # handed on, of a collective that runs meanwhile
            elif user.opcode == "fusion" and (inner := user.attribute("calls")):
                positions = [i for i, name in enumerate(user.operands) if name == value.name]
                used += math.fsum(self._read(inner, position) for position in positions)
            else:
                return whole
        return min(whole, used)

    def _bytes_written(self, called: str, near: tuple[bool, ...]) -> float:
        computation = self._module.computations[called]
        root = computation.instructions[computation.root]
        parts = [root]
        if root.opcode == "tuple":
            parts = [computation.instructions[name] for name in root.operands]
        return math.fsum(
            self._bytes_of_result(computation, part)
            for part, is_near in zip(parts, near, strict=False)
            if not is_near
        )

    def _bytes_of_result(self, computation: Computation, part: Instruction) -> float:
        while part.opcode == "bitcast":
            part = computation.instructions[part.operands[0]]
        if part.opcode in (*COLLECTIVES, "custom-call", "parameter"):
            return 0.0
        if part.opcode == "dynamic-update-slice":
            return math.fsum(a.bytes for a in computation.instructions[part.operands[1]].arrays)
        if part.opcode == "fusion" and (inner := part.attribute("calls")):
            return self._written(inner, tuple(False for _ in part.arrays))
        return math.fsum(array.bytes for array in part.arrays)


def _near(instruction: Instruction) -> bool:
    return bool(instruction.arrays) and all(array.near for array in instruction.arrays)


def _bytes(arrays: Iterable[Array]) -> float:
    return math.fsum(array.bytes for array in arrays if not array.near)


def _is_scatter(called: str) -> bool:
    """TPUs run a reduce-scatter as a fusion of all-reduce and slice under this name."""
    return called.startswith("all-reduce-scatter")


def _branches(instruction: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if listed:
        return re.findall(r"%?([\w.\-]+)", listed.group(1))
    names = (instruction.attribute(f"{which}_computation") for which in ("true", "false"))
    return [name for name in names if name is not None]


def trip_count(module: Module, computation: Computation, loop: Instruction) -> float | None:
    """Turns of a while loop, None where they depend on data.

    XLA writes the number down where it knows it. TPU programs leave it out: there it follows from
    the bound that the condition compares a counter with, the counter's start and its step.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return float(known.group(1))
    state = computation.instructions[loop.operands[0]]
    compared = _compared(module, module.computations[loop.attribute("condition") or ""])
    if compared is None or state.opcode != "tuple":
        return None
    handed = [_value_in(computation, name) for name in state.operands]
    counter, limit = (_value_of(each) for each in compared)
    if isinstance(limit, int):
        limit = handed[limit]
    if not isinstance(limit, float) or not isinstance(counter, int):
        return None
    body = module.computations[loop.attribute("body") or ""]
    return math.ceil((limit - (handed[counter] or 0.0)) / _step(body, counter, handed)) * 1.0


def _compared(module: Module, condition: Computation) -> list[Instruction] | None:
    """The two sides of a condition that says less-than, as values of the loop's state."""
    root = condition.instructions[condition.root]
    operands = [condition.instructions[each] for each in root.operands]
    if root.opcode == "fusion" and (called := root.attribute("calls")):
        inner = module.computations[called]
        root = inner.instructions[inner.root]
        operands = [
            operands[int(each.text)] if each.opcode == "parameter" else each
            for each in (inner.instructions[name] for name in root.operands)
        ]
    less = root.opcode == "compare" and "direction=LT" in root.attributes
    return operands if less else None


def _value_in(computation: Computation, name: str) -> float | None:
    """The number behind a name, if it is one."""
    value = computation.instructions[name]
    while value.opcode in ("copy", "bitcast"):
        value = computation.instructions[value.operands[0]]
    return float(value.text) if value.opcode == "constant" and value.text.isdigit() else None


def _value_of(value: Instruction) -> float | int | None:
    """A constant as a float; else the value's place in the loop's state, an int."""
    if value.opcode == "constant":
        return float(value.text) if value.text.isdigit() else None
    if value.opcode != "get-tuple-element":
        return None
    return int(re.findall(r"index=(\d+)", value.attributes)[0])


def _step(body: Computation, counter: int, handed: list[float | None]) -> float:
    """What a turn adds to the counter: 1, but 2 where XLA has unrolled the loop once."""
    value = body.instructions[body.instructions[body.root].operands[counter]]
    while value.opcode in ("copy", "bitcast"):
        value = body.instructions[value.operands[0]]
    if value.opcode == "add":
        for name in value.operands:
            found = _value_of(body.instructions[name])
            if isinstance(found, int) and found != counter:
                found = handed[found]
            if isinstance(found, float):
                return found
    return 1.0


def _collective(computation: Computation, instruction: Instruction, times: float) -> Collective:
    operands = [computation.instructions[name] for name in instruction.operands]
    arrays = [array for operand in operands for array in operand.arrays]
    kind = instruction.opcode.removesuffix("-start")
    groups = replica_groups(instruction.attributes)
    size = math.fsum(array.bytes for array in arrays)
    if kind == "all-gather":
        size *= max(map(len, groups), default=1)
    found = re.search(r"channel_id=(\d+)", instruction.attributes)
    channel = f"channel {found.group(1)}" if found else ""
    names = tuple(map(str, arrays))
    return Collective(kind, names, size, groups, instruction.origin, times, channel)


def _flops_declared(instruction: Instruction) -> float:
    """What a Pallas kernel says of itself."""
    found = re.search(r'"cost_estimate":(\{[^}]*\})', instruction.attributes)
    return float(json.loads(found.group(1)).get("flops", 0)) if found else 0.0


def replica_groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    """The groups of devices that a collective joins, in any of HLO's spellings."""
    pairs = re.search(r"source_target_pairs=\{((?:\{[\d,]*\},?)*)\}", attributes)
    listed = pairs or re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes)
    if listed:
        found = re.findall(r"\{([\d,]*)\}", listed.group(1))
        groups = tuple(tuple(int(i) for i in group.split(",") if i) for group in found)
        return (tuple(sorted({i for pair in groups for i in pair})),) if pairs else groups
    iota = re.search(rf"replica_groups=\[([\d,]+)\]<={_IOTA}", attributes)
    if iota:
        shape, *order = iota.groups()
        return _as_groups(_iota(*order).reshape(_numbers(shape)))
    mesh = re.search(
        rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))? ?\{{([^}}]*)\}}", attributes
    )
    if mesh:
        axes = re.findall(r"'(\w+)'=(\d+)", mesh.group(1))
        sizes = [int(size) for _, size in axes]
        joined = re.findall(r"'(\w+)'", mesh.group(4))
        ids = _iota(*mesh.groups()[1:3]) if mesh.group(2) else np.arange(math.prod(sizes))
        kept = [i for i, (name, _) in enumerate(axes) if name not in joined]
        moved = [i for i, (name, _) in enumerate(axes) if name in joined]
        width = math.prod(sizes[i] for i in moved)
        return _as_groups(ids.reshape(sizes).transpose([*kept, *moved]).reshape(-1, width))
    return ()


_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


def _iota(reshape: str, order: str | None) -> np.ndarray:
    """Counted up in one shape, transposed: how HLO writes long lists of devices."""
    sizes = _numbers(reshape)
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(_numbers(order) if order else range(len(sizes))).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _as_groups(ids: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(i) for i in group) for group in ids.reshape(-1, ids.shape[-1]))
