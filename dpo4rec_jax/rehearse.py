"""Compiles the loop for a machine that is not there: python -m dpo4rec_jax.rehearse
--config configs/llama31-8b.yaml --topology v5e:4x4  (or h100:8)

Says of sampling, alignment and re-ranking what a chip's memory must hold, what it computes and
moves, how long that takes at the least, and the largest batch that fits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dpo4rec_jax.command import add_config_arguments, exit_status
from dpo4rec_jax.config import InputError, load_config
from dpo4rec_jax.workspace import write_json


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dpo4rec_jax.rehearse",
        description="Compiles a config's sampling, DPO and re-ranker programs ahead of time for a "
        "TPU topology (needs jax[tpu], no TPU), for Hopper GPUs (jax[cuda12] or jax[cuda13], no "
        "GPU) or for simulated devices, and prints memory, work, collectives, the least time and "
        "the largest batch.",
        epilog="Exit status: 0 all of it fits, 2 it does not (one line says what is largest) or a "
        "mistake in what was given, 1 a fault of the program.",
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="T",
        help="v5e:16x16, v5p:4x4x4, v6e:4x4, ..., h100:8, h200:4x8 (hosts x GPUs), ... or cpu:8",
    )
    parser.add_argument("--what", metavar="a,b", help="only these: sampling, dpo, rank (all)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument(
        "--memory-gib", type=float, metavar="G", help="memory of a chip in place of its own"
    )
    parser.add_argument(
        "--no-search", action="store_true", help="leave out the search for the largest batch"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status(lambda: rehearse(options))


def rehearse(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.set)
    from dpo4rec_jax.rehearsal.chips import machine_of

    machine = machine_of(options.topology, options.memory_gib)
    from dpo4rec_jax.rehearsal import report
    from dpo4rec_jax.rehearsal.architectures import architecture_of
    from dpo4rec_jax.rehearsal.figures import part_figures
    from dpo4rec_jax.rehearsal.programs import parts_of

    names = parts_of(options.what)
    architecture = architecture_of(config, machine.platform)
    parts = [
        part_figures(name, config, architecture, machine, search=not options.no_search)
        for name in names
    ]
    print(report.as_text(machine, parts))
    if options.json:
        write_json(Path(options.json), report.as_json(machine, parts))
    for part in parts:
        for figures in part.programs:
            if not figures.fits:
                raise InputError(
                    f"{figures.name}: expected at most {machine.chip.hbm / 2**30:.2f} GiB a chip, "
                    f"got {figures.memory.total / 2**30:.2f}; the largest is {figures.largest}; "
                    f"lower {part.counted} (now {part.size}) or spread more over runtime.mesh"
                )


if __name__ == "__main__":
    sys.exit(main())
