"""A rehearsal as Markdown tables, which read as well on a terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from dpo4rec_jax.rehearsal.chips import GIB, Machine
from dpo4rec_jax.rehearsal.figures import Figures, PartFigures

_HEAD = (
    "| program | memory a chip, GiB: arguments + outputs + temporary + beside | TFLOP a chip "
    "(the method's own) | GiB through HBM | collectives, GiB | seconds at the least, by resource "
    "| MFU |\n|---|---|---|---|---|---|---|"
)


def as_json(machine: Machine, parts: Sequence[PartFigures]) -> dict[str, Any]:
    """Every figure, in bytes, seconds and FLOPs."""
    chip = dataclasses.asdict(machine.chip)
    whole = {"topology": machine.topology, "devices": len(machine.devices), "chip": chip}
    return whole | {
        "parts": {
            part.name: dataclasses.asdict(part) | {"fits": part.fits, "seconds": part.seconds}
            for part in parts
        }
    }


def as_text(machine: Machine, parts: Iterable[PartFigures]) -> str:
    """Tables of all parts."""
    chip = machine.chip
    lines = [f"{machine.topology}: {len(machine.devices)} x {chip.name}, {_gib(chip.hbm)} GiB each"]
    for part in parts:
        lines += ["", f"{part.name}: {part.counted} = {part.size}, mesh {part.mesh}", "", _HEAD]
        lines += [_row(figures) for figures in part.programs]
        lines += ["", *_notes(part)]
    return "\n".join(lines)


def _row(figures: Figures) -> str:
    memory = figures.memory
    name = figures.name if figures.calls == 1 else f"{figures.name} (x {figures.calls:g})"
    if not figures.fits and not figures.flops:
        return f"| {name} | **{_gib(memory.total)}**: does not fit | | | | | |"
    parts = (memory.arguments, memory.outputs, memory.temporary + memory.code, memory.beside)
    total = f"{_gib(memory.total)} = {' + '.join(map(_gib, parts))}"
    moved = "; ".join(
        f"{each.kind} of {each.group}: {each.times:g} x, {each.bytes / GIB:.3g}"
        for each in figures.collectives
    )
    seconds = ", ".join(f"{name} {value:.3g}" for name, value in figures.seconds_by.items())
    mfu = "" if figures.mfu is None else f"{figures.mfu:.0%}"
    flops = f"{figures.flops / 1e12:.3g} ({figures.model_flops / 1e12:.3g})"
    through = f"{figures.bytes_moved / GIB:.3g}"
    return f"| {name} | {total} | {flops} | {through} | {moved or 'none'} | {seconds} | {mfu} |"


def _notes(part: PartFigures) -> list[str]:
    lines = [f"- {figures.name}: most memory is {figures.largest}" for figures in part.programs]
    if part.seconds is not None:
        slowest = max(part.programs, key=lambda f: f.calls * (f.seconds or 0.0))
        unit, units = part.programs[0].unit, sum(f.calls * f.units for f in part.programs)
        # Calls of sampling's programs do not make up a step.
        rate = "" if part.name == "sampling" else f", {units / part.seconds:.4g} {unit} a second"
        lines.append(f"- {part.seconds:.3g} s a step at the least{rate}; bound by {slowest.bound}")
    if part.compilations:
        found = "no size fits" if part.largest is None else f"largest that fits: {part.largest}"
        more = " (all there are)" if part.largest and part.largest >= part.most else ""
        lines.append(f"- {part.counted}: {found}{more}, by {part.compilations} compilations")
    for figures in part.programs:
        if figures.loops_counted_once:
            loops = ", ".join(figures.loops_counted_once)
            lines.append(f"- {figures.name}: loops whose turns depend on data count once: {loops}")
    return lines


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
