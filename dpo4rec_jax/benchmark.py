"""Measures the parts of the loop: python -m dpo4rec_jax.benchmark --config configs/...yaml

Each part reports compile time apart, medians of several runs, and how far from the machine's own
measured peaks it is. A part is a module of `benchmarks/` with `measure(config, machine)`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo4rec_jax import __version__, benchmarks
from dpo4rec_jax.command import add_config_arguments, exit_status, settle_malloc
from dpo4rec_jax.config import InputError, load_config
from dpo4rec_jax.workspace import write_json


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dpo4rec_jax.benchmark",
        description="Measures parts of the loop at a config's sizes and prints the figures beside "
        "the machine's own peaks. --set policy.path=random:meta-llama/Llama-3.1-8B-Instruct draws "
        "the weights of that architecture instead of loading them.",
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--what", metavar="a,b", help=f"only these parts: {', '.join(parts())} (all)"
    )
    parser.add_argument("--output", metavar="FILE", help="also write the figures there, as JSON")
    return parser.parse_args(arguments)


def parts() -> list[str]:
    """Names of what can be measured."""
    modules = pkgutil.iter_modules(benchmarks.__path__)
    return sorted({module.name for module in modules} - {"machine", "policies"})


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status(lambda: benchmark(options))


def benchmark(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.set)
    chosen = options.what.split(",") if options.what else parts()
    for name in chosen:
        if name not in parts():
            raise InputError(f"--what {name}: unknown part; known: {', '.join(parts())}")
    from dpo4rec_jax.benchmarks.machine import measure_machine

    machine = measure_machine(config)
    figures: dict[str, Any] = {"version": __version__, "machine": vars(machine)}
    _show("machine", vars(machine))
    for name in chosen:
        module = importlib.import_module(f"dpo4rec_jax.benchmarks.{name}")
        figures[name] = module.measure(config, machine)
        _show(name, figures[name])
    if options.output:
        write_json(Path(options.output), figures)
    print(json.dumps(figures))


def _show(title: str, figures: dict[str, Any], indent: str = "  ") -> None:
    print(title)
    for name, value in figures.items():
        if isinstance(value, dict):
            _show(f"{indent}{name}", value, f"{indent}  ")
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else value
            print(f"{indent}{name:<32} {shown}")


if __name__ == "__main__":
    settle_malloc()
    sys.exit(main())
