"""Runs the DPO4Rec loop: python -m dpo4rec_jax.train --config configs/quickstart.yaml"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from dpo4rec_jax.command import exit_status
from dpo4rec_jax.config import Config, InputError, load_config
from dpo4rec_jax.runtime.progress import MetricsLog, Progress, Stopped
from dpo4rec_jax.stages.plan import Step, inputs_of, plan, selected
from dpo4rec_jax.workspace import Stage, Workspace, digest_of


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dpo4rec_jax.train",
        description="Runs every stage of the loop whose inputs changed and skips those that are "
        "complete. The result is WORKDIR/report.html (.md, .json).",
        epilog="Exit status: 0 done, 2 a mistake in what was given (one line says which), 1 a "
        "fault of the program, 143 stopped by SIGTERM after saving.",
    )
    parser.add_argument("--config", required=True, metavar="C", help="YAML file, see configs/")
    parser.add_argument("--workdir", metavar="D", help="where artifacts go (runs/<config name>)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        help="override a key of the config, e.g. --set rank.backbone=dlcm; may be repeated",
    )
    parser.add_argument(
        "--stages",
        metavar="s,t",
        help="only these: prepare, warmup, reason, encode, rank, evaluate, prefer, align, report",
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
    signal.signal(signal.SIGTERM, lambda *_: progress.stop_requested.set())
    with workspace.locked():
        run(config, workspace, steps, progress, options.resume, options.overwrite)


def run(
    config: Config,
    workspace: Workspace,
    steps: Sequence[Step],
    progress: Progress,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Takes the steps in order; the workspace must be locked."""
    same_config = workspace.adopt(config, overwrite=overwrite)
    _set_up_jax(config)
    for step in steps:
        inputs = inputs_of(step, config, workspace)
        manifest = workspace.manifest(step.stage, step.round)
        unchanged = manifest is not None and manifest["inputs_digest"] == digest_of(inputs)
        if unchanged and not (overwrite and same_config):
            damaged = workspace.damaged(step.stage, step.round)
            if damaged:
                raise InputError(
                    f"{workspace.stage_dir(step.stage, step.round) / damaged}: damaged or missing; "
                    f"rerun its stage: --stages {step.stage} --overwrite"
                )
            progress.say(f"{step}: complete")
            continue
        _run_step(step, inputs, config, workspace, progress, resume)
        if progress.stop_requested.is_set():
            raise Stopped
    report = workspace.path / "report.md"
    if any(step.stage == "report" for step in steps) and report.exists():
        progress.say(report.read_text(encoding="utf-8"))
        progress.say(f"report: {workspace.path / 'report.html'}")


def _run_step(
    step: Step,
    inputs: dict,
    config: Config,
    workspace: Workspace,
    progress: Progress,
    resume: bool,
) -> None:
    module = importlib.import_module(f"dpo4rec_jax.stages.{step.stage}")
    progress.say(f"{step}: running")
    log = MetricsLog(workspace.path, step.stage, step.round)
    try:
        with workspace.running(step.stage, step.round, inputs, keep_partial=resume) as directory:
            if not resume:
                log.rewind(0)
            module.run(Stage(config, workspace, step.stage, step.round, directory, log, progress))
    finally:
        log.close()
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
    sys.exit(main())
