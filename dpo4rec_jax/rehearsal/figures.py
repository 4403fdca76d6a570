"""Figures of a compiled program: does it fit, what does it move, how long at the least."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax

from dpo4rec_jax.config import Config
from dpo4rec_jax.models.llama import LlamaConfig
from dpo4rec_jax.rehearsal import costs, hlo
from dpo4rec_jax.rehearsal.chips import GIB, Machine
from dpo4rec_jax.rehearsal.programs import PARTS, Part, Program

# How often the ring passes a collective's array through every link, by its kind.
_PASSES = {"all-reduce": 2.0}
MOST_COMPILATIONS = 6  # of a search for the largest batch, the first one included
_TOO_LARGE = re.compile(r"RESOURCE_EXHAUSTED|[Rr]an out of memory|exceeds the limit")
_USED = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")
_ALLOCATION = re.compile(r"Size: ([\d.]+[KMG])\s.*?Shape: (\S+)", re.DOTALL)
# Kernels whose work HLO does not show: Pallas's on TPU, cuDNN's attention on GPU.
KERNELS = ("tpu_custom_call", "__cudnn$fmha")
_UNIT = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes a device. `temporary` and `code` are 0 where the compiler gave up before it knew."""

    arguments: float
    outputs: float  # beyond the arguments whose buffers they take over
    temporary: float
    code: float
    beside: float

    @property
    def total(self) -> float:
        return math.fsum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Moved:
    """All collectives of a kind over groups of a size: times and bytes of a call, seconds."""

    kind: str
    group: int
    times: float
    bytes: float
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of one program. Seconds are of a call: the least each resource needs, and their maximum,
    which assumes that all three work at once; their sum is where nothing overlaps."""

    name: str
    calls: int
    unit: str
    units: int
    fits: bool
    largest: str  # what takes most memory
    memory: Memory
    seconds_compiling: float
    flops: float = 0.0  # of a chip
    model_flops: float = 0.0  # of a chip
    bytes_moved: float = 0.0
    collectives: tuple[Moved, ...] = ()
    seconds_by: dict[str, float] = dataclasses.field(default_factory=dict)
    mfu: float | None = None
    loops_counted_once: tuple[str, ...] = ()

    @property
    def seconds(self) -> float | None:
        return max(self.seconds_by.values()) if self.seconds_by else None

    @property
    def bound(self) -> str | None:
        return max(self.seconds_by, key=lambda name: self.seconds_by[name], default=None)


@dataclasses.dataclass(frozen=True)
class PartFigures:
    """Of one part: its programs at the config's size, and the largest size that fits.

    `largest` None where nothing fits; `compilations` 0 where it was not searched for.
    """

    name: str
    mesh: str
    counted: str  # what the size counts
    size: int
    programs: tuple[Figures, ...]
    largest: int | None = None
    most: int = 0
    compilations: int = 0

    @property
    def fits(self) -> bool:
        return all(figures.fits for figures in self.programs)

    @property
    def seconds(self) -> float | None:
        """A step: every program as often as it is called."""
        if any(figures.seconds is None for figures in self.programs):
            return None
        return math.fsum(figures.calls * (figures.seconds or 0.0) for figures in self.programs)


def part_figures(
    name: str, config: Config, architecture: LlamaConfig, machine: Machine, *, search: bool
) -> PartFigures:
    """Compiles a part at the config's size and, where asked for, searches for the largest."""
    part_of = functools.partial(PARTS[name], config, architecture, machine)
    part = part_of()
    found = [rehearse(program, machine) for program in part.programs]
    mesh = ", ".join(f"{axis} {size}" for axis, size in part.programs[0].mesh.shape.items())
    figures = PartFigures(name, mesh, part.what, part.size, tuple(found), most=part.most)
    if not search:
        return figures
    largest, compilations = largest_that_fits(part_of, part, found, machine)
    return dataclasses.replace(figures, largest=largest, compilations=compilations)


def rehearse(program: Program, machine: Machine) -> Figures:
    """Compiles a program and reads it; one that is too large for the chip is a result as well."""
    began = time.perf_counter()
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if not _TOO_LARGE.search(str(error)):
            raise
        return _too_large(program, str(error), time.perf_counter() - began)
    seconds_compiling = time.perf_counter() - began
    memory = _memory(compiled, program.beside)
    return read(program, machine, compiled.as_text() or "", memory, seconds_compiling)


def read(
    program: Program, machine: Machine, text: str, memory: Memory, seconds_compiling: float
) -> Figures:
    """What the HLO text of a compiled program says of it."""
    module = hlo.parse(text)
    found = costs.costs_of(module)
    moved = _collectives(found, program, machine)
    flops = found.flops
    if any(name.startswith(KERNELS) for name in found.kernels):
        flops += program.kernel_flops / program.mesh.size
    figures = Figures(
        name=program.name,
        calls=program.calls,
        unit=program.unit,
        units=program.units,
        fits=memory.total <= machine.chip.hbm,
        largest=_largest(memory, module),
        memory=memory,
        seconds_compiling=seconds_compiling,
        flops=flops,
        model_flops=program.model_flops / program.mesh.size,
        bytes_moved=found.bytes,
        collectives=moved,
        seconds_by=_seconds(flops, found.bytes, moved, machine),
        loops_counted_once=tuple(sorted(found.unknown)),
    )
    if machine.chip.flops is None or not figures.seconds or not program.model_flops:
        return figures
    mfu = figures.model_flops / figures.seconds / machine.chip.flops
    return dataclasses.replace(figures, mfu=mfu)


def _memory(compiled: Any, beside: float) -> Memory:
    found = compiled.memory_analysis()
    return Memory(
        arguments=float(found.argument_size_in_bytes),
        outputs=float(found.output_size_in_bytes - found.alias_size_in_bytes),
        temporary=float(found.temp_size_in_bytes),
        code=float(found.generated_code_size_in_bytes),
        beside=beside,
    )


def _too_large(program: Program, message: str, seconds: float) -> Figures:
    """From the compiler's refusal: how much it wanted, and its largest allocation."""
    used = _USED.search(message)
    wanted = float(used.group(1)) * _UNIT[used.group(2)] if used else float("inf")
    allocation = _ALLOCATION.search(message)
    largest = f"{allocation.group(2)} ({allocation.group(1)})" if allocation else message[:160]
    return Figures(
        name=program.name,
        calls=program.calls,
        unit=program.unit,
        units=program.units,
        fits=False,
        largest=largest,
        memory=Memory(wanted, 0.0, 0.0, 0.0, program.beside),
        seconds_compiling=seconds,
    )


def _largest(memory: Memory, module: hlo.Module) -> str:
    """The part of memory that is largest, and the largest array that it may be made of."""
    part = max(dataclasses.asdict(memory).items(), key=lambda item: item[1])[0]
    entry = module.computations[module.entry]
    arrays = [
        array
        for name, computation in module.computations.items()
        if part != "arguments" or name == module.entry
        for instruction in computation.instructions.values()
        if (instruction.opcode == "parameter") == (part == "arguments")
        and (computation is entry or instruction.opcode not in ("parameter", "tuple"))
        for array in instruction.arrays
        if len(instruction.arrays) == 1 and not array.near
    ]
    if not arrays:
        return part
    array = max(arrays, key=lambda array: array.bytes)
    return f"{part}; of its arrays {array} ({array.bytes / GIB:.3f} GiB)"


def _collectives(done: costs.Costs, program: Program, machine: Machine) -> tuple[Moved, ...]:
    devices = list(program.mesh.devices.flat)
    gathered: dict[tuple[str, int], list[costs.Collective]] = defaultdict(list)
    for each in done.collectives:
        if each.group_size > 1:
            gathered[each.kind, each.group_size].append(each)
    moved = []
    for (kind, size), found in sorted(gathered.items()):
        seconds = [_seconds_of(each, devices, machine) for each in found]
        moved.append(
            Moved(
                kind,
                size,
                times=math.fsum(each.times for each in found),
                bytes=math.fsum(each.times * each.bytes for each in found),
                seconds=None if None in seconds else math.fsum(s for s in seconds if s is not None),
            )
        )
    return tuple(moved)


def _seconds_of(collective: costs.Collective, devices: list[Any], machine: Machine) -> float | None:
    """Bandwidth alone, in a ring: an all-gather brings (n - 1) / n of its array to every chip."""
    group = max(collective.groups, key=len)
    bandwidth = machine.axis_bandwidth(devices[index] for index in group)
    if bandwidth is None:
        return None
    share = 1.0 if collective.kind == "collective-permute" else (len(group) - 1) / len(group)
    passes = _PASSES.get(collective.kind, 1.0)
    return collective.times * collective.bytes * share * passes / bandwidth


def _seconds(
    flops: float, bytes_moved: float, moved: tuple[Moved, ...], machine: Machine
) -> dict[str, float]:
    chip = machine.chip
    if chip.flops is None or chip.hbm_bandwidth is None:
        return {}
    return {
        "compute": flops / chip.flops,
        "HBM": bytes_moved / chip.hbm_bandwidth,
        "interconnect": math.fsum(each.seconds or 0.0 for each in moved),
    }


def largest_that_fits(
    part_of: Callable[[int], Part], first: Part, found: list[Figures], machine: Machine
) -> tuple[int | None, int]:
    """(the largest size all of whose programs fit, compilations). None: not even the smallest.

    Memory is all but linear in the size: from two sizes that compiled a third is predicted, and
    compiled to be sure; what is reported has been compiled.
    """
    tried = {first.size: all(figures.fits for figures in found)}
    memory = {first.size: max(each.memory.total for each in found)} if tried[first.size] else {}
    compilations = 1
    while compilations < MOST_COMPILATIONS:
        size = _next_size(first, tried, memory, machine.chip.hbm)
        if size is None:
            break
        compilations += 1
        programs = part_of(size).programs
        again = [rehearse(program, machine) for program in programs]
        tried[size] = all(figures.fits for figures in again)
        if tried[size]:
            memory[size] = max(each.memory.total for each in again)
    fitting = [size for size, fits in tried.items() if fits]
    return max(fitting, default=None), compilations


def _next_size(
    part: Part, tried: dict[int, bool], memory: dict[int, float], room: float
) -> int | None:
    """The size to compile next, a multiple of the part's; None where the answer is known."""
    fitting = [size for size, fits in tried.items() if fits]
    failing = [size for size, fits in tried.items() if not fits]
    low = max(fitting, default=0)
    high = min(failing, default=part.most + part.multiple)
    if high - low <= part.multiple:
        return None
    if len(memory) >= 2:
        (a, at_a), (b, at_b) = sorted(memory.items())[-2:]
        slope = max((at_b - at_a) / (b - a), 1.0)
        guess = low + int(0.98 * (room - memory[low]) / slope)
    elif fitting:
        guess = 2 * low
    else:
        guess = high // 2
    guess = guess // part.multiple * part.multiple
    return min(max(guess, low + part.multiple), high - part.multiple)
