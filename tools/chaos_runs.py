"""The small complete run that `tools/chaos.py` disturbs: how it is started, and compared."""

from __future__ import annotations

import collections
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo4rec_jax.config import load_config
from dpo4rec_jax.stages.plan import Step, plan
from dpo4rec_jax.workspace import Workspace

REPOSITORY = Path(__file__).parents[1]
CONFIG = REPOSITORY / "configs" / "quickstart.yaml"
SMALL = (
    "data.synthetic.users=60",
    "data.synthetic.items=40",
    "data.synthetic.interactions=20",
    "policy.tiny_width=16",
    "policy.tiny_heads=2",
    "warmup.steps=12",
    "warmup.save_every=3",
    "reason.samples=3",
    "reason.max_new_tokens=12",
    "reason.slots=16",
    "encode.features=16",
    "rank.seeds=2",
    "rank.epochs=3",
    "rank.batch_lists=16",
    "rank.embedding=4",
    "align.epochs=2",
    "align.batch_pairs=8",
    "align.microbatch_pairs=4",
    "align.max_shapes=1",
    "align.save_every=2",
    "evaluate.resamples=200",
    "runtime.compilation_cache=false",  # a cache of its own, in the environment
)
LIMIT_S = 3600.0


class Lost(Exception):
    """A run did not come back to what it was."""


@dataclass(frozen=True)
class Ended:
    status: int
    said: str

    @property
    def line(self) -> str:
        return next(iter(reversed(self.said.strip().splitlines())), "")


@dataclass(frozen=True)
class Reference:
    """The undisturbed run, and how long and how many changes to files each of its steps took."""

    workspace: Workspace
    steps: list[Step]
    seconds: list[float]
    changes: list[int]


class Runs:
    """Starts the command with the small config and a shared cache of compiled programs."""

    def __init__(self, cache: Path):
        self._environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def start(
        self, workdir: Path, *more: str, fault: dict[str, Any] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        settings = [word for setting in SMALL for word in ("--set", setting)]
        command = [sys.executable, str(Path(__file__).with_name("chaos_child.py"))]
        command += [json.dumps((fault or {}) | {"workdir": str(workdir)}), "--config", str(CONFIG)]
        command += ["--workdir", str(workdir), *settings, *more]
        return subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=self._environment, **options
        )

    def whole(self, workdir: Path, *more: str, **options: Any) -> Ended:
        return finish(self.start(workdir, *more, **options))


def finish(process: subprocess.Popen[str], said: str = "") -> Ended:
    timer = threading.Timer(LIMIT_S, process.kill)
    timer.start()
    try:
        _, rest = process.communicate()
    finally:
        timer.cancel()
    return Ended(process.returncode, said + rest)


def reached(process: subprocess.Popen[str], step: Step) -> str:
    """Reads what the process says until it begins the step; returns it."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if line.startswith(f"{step}: running"):
            break
    return said


def undisturbed(runs: Runs, scratch: Path) -> Reference:
    """Runs twice: into an empty cache of compiled programs, then from it. Both must agree."""
    first, second = scratch / "cold", scratch / "reference"
    for workdir in (first, second):
        counted = {"count": str(scratch / "changes.json")}
        ended = runs.whole(workdir, fault=counted)
        if ended.status:
            raise Lost(f"the undisturbed run itself fails ({ended.status}): {ended.line}")
    config = load_config(second / "config.yaml")
    steps, workspace = plan(config), Workspace(second)
    manifests = [workspace.manifest(step.stage, step.round) or {} for step in steps]
    ends = json.loads((scratch / "changes.json").read_text(encoding="utf-8"))
    changes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    reference = Reference(workspace, steps, [m["seconds"] for m in manifests], changes)
    compare(reference, first)
    shutil.rmtree(first)
    return reference


def compare(reference: Reference, workdir: Path, cut_log: Sequence[Step] = ()) -> None:
    """Raises Lost unless report, artifacts and log are those of the undisturbed run. The log may
    lack lines of the steps in whose midst, or after which, it was cut; no artifact needs them."""
    workspace = Workspace(workdir)
    for step in reference.steps[:-1]:
        expected, got = (
            each.manifest(step.stage, step.round) for each in (reference.workspace, workspace)
        )
        if got is None or expected is None or got["outputs_digest"] != expected["outputs_digest"]:
            files = (expected or {}).get("files", {}), (got or {}).get("files", {})
            names = [n for n in files[0] | files[1] if files[0].get(n) != files[1].get(n)]
            raise Lost(f"{step}: other artifacts: {', '.join(names) or 'none at all'}")
    for name, read in {"report.json": result, "report.md": Path.read_text}.items():
        if read(workdir / name) != read(reference.workspace.path / name):
            raise Lost(f"another {name}")
    ours, theirs = logged(workdir), logged(reference.workspace.path)
    excused = {(step.stage, step.round) for step in cut_log}
    missing = [line for line in theirs - ours if _of(line) not in excused]
    if missing or ours - theirs:
        raise Lost(f"metrics.jsonl: {list(ours - theirs)} for {missing}")


def result(path: Path) -> str:
    report = json.loads(path.read_text(encoding="utf-8"))
    return json.dumps({name: value for name, value in report.items() if name != "seconds"})


def logged(workdir: Path) -> collections.Counter[str]:
    """The lines of metrics.jsonl without what depends on the clock, and without those of training,
    whose intervals begin anew where it was continued."""
    lines = collections.Counter()
    for text in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        timed = [name for name in line if name == "time" or "second" in name]
        if "grad_norm" not in line:
            lines[json.dumps({k: v for k, v in line.items() if k not in timed})] += 1
    return lines


def _of(line: str) -> tuple[str, int | None]:
    entry = json.loads(line)
    return entry["stage"], entry["round"]


def snapshot(reference: Reference, index: int, workdir: Path) -> None:
    """The undisturbed workspace as it was when the step began."""
    shutil.copytree(reference.workspace.path, workdir)
    gone = {(step.stage, step.round) for step in reference.steps[index:]}
    for stage, round in gone:
        shutil.rmtree(Workspace(workdir).stage_dir(stage, round))
    for report in workdir.glob("report.*"):
        report.unlink()
    log = workdir / "metrics.jsonl"
    kept = []
    for text in log.read_text(encoding="utf-8").splitlines(keepends=True):
        line = json.loads(text)
        if (line["stage"], line["round"]) not in gone:
            kept.append(text)
    log.write_text("".join(kept), encoding="utf-8")
