"""Runs the DPO4Rec loop: python -m dpo4rec_jax.train --config configs/quickstart.yaml"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dpo4rec_jax import __version__
from dpo4rec_jax.command import add_config_arguments, exit_status, settle_malloc
from dpo4rec_jax.config import Config, InputError, load_config
from dpo4rec_jax.runtime import launch
from dpo4rec_jax.runtime.processes import this
from dpo4rec_jax.runtime.progress import MetricsLog, Progress, Stopped
from dpo4rec_jax.runtime.tracking import Tracker, tracking
from dpo4rec_jax.stages.plan import OUTSIDE, TOGETHER, Step, inputs_of, plan, selected
from dpo4rec_jax.workspace import Stage, Workspace, digest_of, rerun


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dpo4rec_jax.train",
        description="Runs every stage of the loop whose inputs changed and skips those that are "
        "complete. The result is WORKDIR/report.html (.md, .json).",
        epilog="Exit status: 0 done, 2 a mistake in what was given (one line says which), 1 a "
        "fault of the program, 143 stopped by SIGTERM after saving.",
    )
    add_config_arguments(parser)
    parser.add_argument("--workdir", metavar="D", help="where artifacts go (runs/<config name>)")
    parser.add_argument(
        "--stages",
        metavar="s,t",
        help="only these: prepare, warmup, reason, encode, rank, evaluate, prefer, align, report; "
        "round0/rank: of one round",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted stage from its partial files, to the same result",
    )
    existing.add_argument(
        "--overwrite",
        action="store_true",
        help="replace results: of another config, the stages it changes; of the same, all of them",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print stages, sizes, estimated tokens and memory, and stop",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status(lambda: train(options))


def train(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.set)
    workspace = Workspace(Path(options.workdir or f"runs/{config.name}"))
    steps = selected(plan(config), options.stages and options.stages.split(","))
    if options.dry_run:
        from dpo4rec_jax.stages.estimate import describe

        print(describe(config, workspace, steps))
        return
    progress = Progress()
    launch.start(config.runtime, progress.stop_requested)
    this().barrier("command", _asked_for(config, options))
    with workspace.locked(), _stopped_by_signals(progress):
        run(config, workspace, steps, progress, options.resume, options.overwrite)
        this().barrier("end")


def _asked_for(config: Config, options: argparse.Namespace) -> str:
    """Digest of what must be alike in all processes of a run."""
    values = config.model_dump(
        mode="json", exclude={"runtime": {"processes", "heartbeat_s", "cache_dir"}}
    )
    return digest_of([values, options.stages, options.resume, options.overwrite, __version__])


@contextlib.contextmanager
def _stopped_by_signals(progress: Progress) -> Iterator[None]:
    """The first SIGTERM or Ctrl-C stops the run where it may save; a second one stops it there."""
    received: list[int] = []

    def request(number: int, _: object) -> None:
        received.append(number)
        progress.stop_requested.set()
        progress.say("stopping as soon as everything is saved")
        signal.signal(number, before[number])

    before: dict[int, Any] = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)
    }
    for number in before:
        signal.signal(number, request)
    try:
        yield
    except Stopped:
        if received and received[0] == signal.SIGINT:  # else another process was asked to stop
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Run:
    """What every step of a run is taken with; `anew`: complete steps are run again."""

    config: Config
    workspace: Workspace
    progress: Progress
    tracker: Tracker | None
    resume: bool
    anew: bool


def run(
    config: Config,
    workspace: Workspace,
    steps: Sequence[Step],
    progress: Progress,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Takes the steps in order; the workspace must be locked."""
    same_config = this().from_main(lambda: workspace.adopt(config, overwrite=overwrite))
    _set_up_jax(config)
    with tracking(config, workspace.path) if this().main else contextlib.nullcontext() as tracker:
        for place, step in enumerate(steps, 1):
            with progress.step(str(step), place, len(steps)):
                anew = overwrite and same_config
                _take(step, Run(config, workspace, progress, tracker, resume, anew))
    report = workspace.path / "report.md"
    if any(step.stage == "report" for step in steps) and report.exists():
        progress.say(report.read_text(encoding="utf-8"))
        progress.say(f"report: {workspace.path / 'report.html'}")


def _to_run(step: Step, given: Run) -> dict[str, Any] | None:
    """The inputs of a step that must run; None for one that is complete, unless asked anew."""
    workspace = given.workspace
    inputs = inputs_of(step, given.config, workspace)
    manifest = None if given.anew else workspace.manifest(step.stage, step.round)
    if manifest is None or manifest["inputs_digest"] != digest_of(inputs):
        return inputs
    damaged = workspace.damaged(step.stage, step.round)
    if damaged:
        raise InputError(f"{damaged}: damaged or missing; {rerun(step.stage, step.round)}")
    return None


def _take(step: Step, given: Run) -> None:
    """Runs a step unless it is complete. Raises Stopped where a signal asked for it meanwhile."""
    inputs = this().from_main(partial(_to_run, step, given))
    if inputs is None:
        given.progress.say(f"{step}: complete")
        return
    _run_step(step, inputs, given)
    if given.progress.stop_requested.is_set():
        raise Stopped


def _run_step(step: Step, inputs: dict, given: Run) -> None:
    workspace, progress = given.workspace, given.progress
    module = importlib.import_module(f"dpo4rec_jax.stages.{step.stage}")
    progress.say(f"{step}: running")
    log = MetricsLog(workspace.path, step.stage, step.round, given.tracker)
    try:
        running = workspace.running(
            step.stage,
            step.round,
            inputs,
            keep_partial=given.resume,
            outside=OUTSIDE.get(step.stage, ()),
        )
        with running as directory:
            if not given.resume:
                log.rewind(0)
            stage = Stage(given.config, workspace, step.stage, step.round, directory, log, progress)
            if this().main or step.stage in TOGETHER:
                module.run(stage)
            if given.resume:
                log.settle()
    finally:
        log.close()
    if this().main:
        manifest = workspace.manifest(step.stage, step.round)
        assert manifest is not None
        progress.say(f"{step}: done in {manifest['seconds']:.1f} s")


def _set_up_jax(config: Config) -> None:
    import jax

    if config.runtime.compilation_cache:
        cache = Path(config.runtime.cache_dir).expanduser() / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


if __name__ == "__main__":
    settle_malloc()
    sys.exit(main())
