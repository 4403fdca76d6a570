"""The text of a compiled HLO module, parsed: computations of instructions."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

BYTES = {
    **{"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2},
    **{"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16},
}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape; `near` where it lies in on-chip memory instead of HBM."""

    dtype: str
    sizes: tuple[int, ...]
    near: bool

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def bytes(self) -> float:
        each = BYTES.get(self.dtype) or (1 if self.dtype.startswith("f8") else 0)
        return float(self.elements * each)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.sizes))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of its result; several for a tuple
    operands: tuple[str, ...]
    attributes: str
    text: str  # between the parentheses

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found and found.group(1)

    @property
    def origin(self) -> str:
        """The path of the JAX operation that it came from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else self.name


@dataclasses.dataclass(frozen=True)
class Computation:
    instructions: Mapping[str, Instruction]
    root: str

    def parameter(self, index: int) -> Instruction | None:
        for instruction in self.instructions.values():
            if instruction.opcode == "parameter" and int(instruction.text) == index:
                return instruction
        return None

    def users(self, name: str) -> Iterator[Instruction]:
        return (each for each in self.instructions.values() if name in each.operands)


@dataclasses.dataclass(frozen=True)
class Module:
    computations: Mapping[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Raises ValueError for text without an entry computation."""
    computations, entry = {}, None
    name, instructions, root = "", {}, ""
    for line in _lines(text):
        header = _HEADER.match(line)
        if header:
            name, instructions, root = header.group(2), {}, ""
            entry = name if header.group(1) else entry
        elif line == "}" and name:
            computations[name] = Computation(instructions, root)
            name = ""
        elif name and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(found.group(2), found.group(3))
            instructions[instruction.name] = instruction
            root = instruction.name if found.group(1) else root
    if entry is None:
        raise ValueError("no entry computation: not the text of a compiled HLO module")
    return Module(computations, entry)


def _lines(text: str) -> Iterator[str]:
    """Metadata of kernels runs over several lines, which belong to the instruction before them."""
    whole = ""
    for line in text.splitlines():
        if line == "}" or line.startswith(("%", "ENTRY", "  ", "HloModule")):
            yield whole
            whole = line
        else:
            whole += line
    yield whole


def _instruction(name: str, rest: str) -> Instruction:
    shape_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opening = rest.index("(", shape_end)
    closing = _closing(rest, opening)
    text = rest[opening + 1 : closing]
    return Instruction(
        name=name,
        opcode=rest[shape_end:opening].strip(),
        arrays=tuple(_arrays(rest[:shape_end])),
        operands=tuple(re.findall(r"%([\w.\-]+)", text)),
        attributes=rest[closing + 1 :],
        text=text,
    )


def _closing(text: str, opening: int) -> int:
    depth = 0
    for found in re.finditer(r"[()]", text[opening:]):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return opening + found.start()
    raise ValueError(f"unbalanced parentheses: {text[:120]}")


def _arrays(shape: str) -> Iterator[Array]:
    for dtype, sizes, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape)):
        if dtype not in ("token", "opaque"):
            near = re.search(r"S\([1-9]\d*\)", layout) is not None
            yield Array(dtype, tuple(int(size) for size in sizes.split(",") if size), near)
