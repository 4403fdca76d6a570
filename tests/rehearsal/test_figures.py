"""The search for the largest batch, and bandwidths of groups on a torus."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from dpo4rec_jax.rehearsal import figures
from dpo4rec_jax.rehearsal.chips import CHIPS, GPUS, Machine
from dpo4rec_jax.rehearsal.figures import Figures, Memory
from dpo4rec_jax.rehearsal.programs import Part, Program
from dpo4rec_jax.runtime.mesh import AXES

ROOM = 1000.0


def compiled(size: int, base: float, each: float) -> Figures:
    memory = Memory(base, 0.0, each * size, 0.0, 0.0)
    return Figures("step", 1, "pairs", size, memory.total <= ROOM, "temporary", memory, 0.0)


@pytest.mark.parametrize(
    ("base", "each", "first", "most", "expected"),
    [
        (100.0, 7.0, 8, 4096, 128),  # (1000 - 100) / 7 = 128.6
        (0.0, 0.1, 8, 64, 64),  # everything fits
        (100.0, 100.0, 64, 4096, 8),  # 9 would, in eights
        (2000.0, 1.0, 8, 4096, None),
    ],
)
def test_the_largest_size_that_fits_is_found_in_few_compilations(
    monkeypatch, base: float, each: float, first: int, most: int, expected: int | None
) -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)

    def part_of(size: int) -> Part:
        program = Program("step", lambda: pytest.fail("lowered"), mesh, "pairs", size, 0.0)
        return Part((program,), "align.microbatch_pairs", size, 8, most)

    def rehearse(program: Program, machine: Machine) -> Figures:
        return compiled(int(program.units), base, each)

    machine = Machine("", dataclasses.replace(CHIPS["v5e"], hbm=ROOM), [], [])
    monkeypatch.setattr(figures, "rehearse", rehearse)
    start = [compiled(first, base, each)]
    found, compilations = figures.largest_that_fits(part_of, part_of(first), start, machine)
    assert found == expected
    assert compilations <= figures.MOST_COMPILATIONS


def torus(chip: str, *lengths: int) -> Machine:
    columns, rows, *rest = lengths
    layers = rest[0] if rest else 1
    devices: list[Any] = [
        SimpleNamespace(coords=(x, y, z), platform="tpu")
        for z in range(layers)
        for y in range(rows)
        for x in range(columns)
    ]
    return Machine("", CHIPS[chip], devices, devices)


def test_a_group_has_the_links_of_the_dimensions_that_it_spans() -> None:
    link = CHIPS["v5e"].link_bandwidth
    assert link == 50e9
    open_square, closed = torus("v5e", 4, 4), torus("v5e", 16, 16)
    assert open_square.axis_bandwidth(open_square.devices[:4]) == link  # a row without a way back
    assert open_square.axis_bandwidth(open_square.devices) == 2 * link
    assert closed.axis_bandwidth(closed.devices[:16]) == 2 * link  # a ring, both ways round
    assert closed.axis_bandwidth(closed.devices[:4]) == link  # a part of a ring is a line


def test_v5p_closes_its_dimensions_at_four() -> None:
    cube = torus("v5p", 4, 4, 4)
    link = CHIPS["v5p"].link_bandwidth
    assert link is not None
    assert cube.axis_bandwidth(cube.devices) == 6 * link


def test_gpus_have_nvlink_within_a_host_and_the_network_between_hosts() -> None:
    chip = GPUS["h100"]
    devices: list[Any] = [SimpleNamespace(process_index=index // 8) for index in range(16)]
    machine = Machine("h100:2x8", chip, devices, devices[:8])
    assert machine.axis_bandwidth(devices[:8]) == chip.link_bandwidth == 450e9
    assert machine.axis_bandwidth(devices[::8]) == chip.network_bandwidth == 50e9


def test_memory_is_the_sum_of_its_parts() -> None:
    assert Memory(1.0, 2.0, 3.0, 4.0, 5.0).total == 15.0
    assert dataclasses.asdict(Memory(1.0, 2.0, 3.0, 4.0, 5.0))["beside"] == 5.0
