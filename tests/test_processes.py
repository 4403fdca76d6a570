"""Real processes as one run: the report of one, no one left waiting, and a result that survives."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from process_group import ROOT, finish, start

from dpo4rec_jax.runtime.checkpoint import load_arrays

TOY = """
base: {base}
data: {{synthetic: {{users: 48, items: 40, interactions: 24}}}}
policy: {{tiny_width: 32, tiny_layers: 1}}
warmup: {{steps: 16, batch: 8, samples: 4, log_every: 1}}
reason: {{samples: 4, max_new_tokens: 12, memory_gib: 0.2}}
rank: {{seeds: 3, epochs: 2, embedding: 8}}
align: {{batch_pairs: 8, log_every: 1, save_every: 2}}
evaluate: {{resamples: 200}}
runtime: {{cache_dir: {cache}, heartbeat_s: 300}}
"""

# The train command in which a process fails, or is told to stop, as it places its third batch of
# stage align; the other one then waits for it in a collective.
AT_THIRD_BATCH = """
import os, signal, sys
from dpo4rec_jax import train
from dpo4rec_jax.config import InputError
from dpo4rec_jax.runtime import progress
from dpo4rec_jax.stages import align, tuning
progress.SILENCE_SECONDS = 0.2  # a line that says it is alive is due at any moment
place, seen = tuning.Tuning.place, []
def placed(self, arrays):
    if "logp_reference_BP" in arrays and os.environ["JAX_PROCESS_ID"] == "1":
        seen.append(1)
        if len(seen) == 5:
            {what}
    return place(self, arrays)
tuning.Tuning.place = placed
sys.exit(train.main(sys.argv[1:]))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("config")
    path = directory / "toy.yaml"
    base = ROOT / "configs" / "quickstart.yaml"
    path.write_text(TOY.format(base=base, cache=directory / "cache"))
    return path


def arguments(config: Path, workdir: Path, *more: str) -> list[str]:
    return ["--config", str(config), "--workdir", str(workdir), *more]


def run(config: Path, workdir: Path, count: int, devices: int, *more: str) -> None:
    for status, output in finish(start(count, devices, arguments(config, workdir, *more))):
        assert status == 0, output[-3000:]


@pytest.fixture(scope="module")
def two(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole run by two processes of four devices."""
    workdir = tmp_path_factory.mktemp("two")
    run(config, workdir, 2, 4)
    return workdir


def copy_until_align(source: Path, target: Path) -> Path:
    """A workspace whose stage align, and what reads it, has yet to run."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    for stage in ("round0/align", "round1", "report"):
        shutil.rmtree(target / stage)
    return target


def losses(workdir: Path) -> dict[tuple[str, int], float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "grad_norm" in line]
    return {(line["stage"], line["step"]): line["loss"] for line in training}


def pairs(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "round0/prefer/pairs.jsonl").open()]


def aligned(workdir: Path) -> dict[str, Any]:
    return load_arrays(workdir / "round0/align/policy/model.safetensors")


def test_two_processes_give_the_report_of_one(config: Path, two: Path, tmp_path: Path) -> None:
    run(config, tmp_path, 1, 8)
    for text in ("round0/reason/users.jsonl", "round1/reason/users.jsonl"):
        assert (two / text).read_text() == (tmp_path / text).read_text()
    assert pairs(two) == pairs(tmp_path)
    ours, theirs = (json.loads((w / "report.json").read_text()) for w in (two, tmp_path))
    assert ours["rows"] == theirs["rows"]
    assert ours["comparisons"] == theirs["comparisons"]
    assert ours["data"] == theirs["data"]
    ours, theirs = losses(two), losses(tmp_path)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 16 + 3 * -(-round(len(pairs(two)) * 0.95) // 8)
    for name, loss in ours.items():
        assert loss == pytest.approx(theirs[name], abs=1e-5)
    assert not list(two.rglob("*.part*"))


@pytest.mark.parametrize("killed", [0, 1])
def test_killing_one_ends_the_other_and_resume_gives_the_same(
    config: Path, two: Path, tmp_path: Path, killed: int
) -> None:
    workdir = copy_until_align(two, tmp_path)
    heartbeat = ("--set", "runtime.heartbeat_s=30")
    group = start(2, 4, arguments(config, workdir, *heartbeat))
    checkpoints = workdir / "round0/align/checkpoints"
    while not any(path.name.isdigit() for path in checkpoints.glob("*")):
        assert all(process.poll() is None for process in group)
        time.sleep(0.05)
    group[killed].send_signal(signal.SIGKILL)
    began = time.monotonic()
    survivor, output = finish([group[1 - killed]])[0]
    assert time.monotonic() - began < 60
    assert survivor != 0
    assert "stopped answering" in output or "another task died" in output
    group[killed].communicate()
    run(config, workdir, 2, 4, "--resume")
    for name, value in aligned(two).items():
        np.testing.assert_array_equal(aligned(workdir)[name], value, err_msg=name)
    ours, theirs = (json.loads((w / "report.json").read_text()) for w in (workdir, two))
    assert ours["rows"] == theirs["rows"]


def test_a_mistake_in_one_process_ends_both_with_its_line(
    config: Path, two: Path, tmp_path: Path
) -> None:
    workdir = copy_until_align(two, tmp_path)
    code = AT_THIRD_BATCH.format(what='raise InputError("the third batch is torn")')
    began = time.monotonic()
    for status, output in finish(start(2, 4, arguments(config, workdir), code)):
        assert status == 2, output[-3000:]
        assert output.strip().splitlines()[-1] == "error: the third batch is torn"
        assert "Traceback" not in output
    assert time.monotonic() - began < 120


def test_sigterm_to_one_stops_both_at_one_step_and_any_mesh_goes_on(
    config: Path, two: Path, tmp_path: Path
) -> None:
    workdir = copy_until_align(two, tmp_path / "same")
    code = AT_THIRD_BATCH.format(what="os.kill(os.getpid(), signal.SIGTERM)")
    for status, output in finish(start(2, 4, arguments(config, workdir), code)):
        assert status == 143, output[-3000:]
        assert "stopped by SIGTERM; continue with --resume" in output
    assert not (workdir / "round0/align/policy").exists()
    other = tmp_path / "other"
    shutil.copytree(workdir, other)
    run(config, workdir, 2, 4, "--resume", "--stages", "align")
    for name, value in aligned(two).items():
        np.testing.assert_array_equal(aligned(workdir)[name], value, err_msg=name)
    mesh = ("--set", "runtime.mesh={data: 1, fsdp: 2, tensor: 1}")
    run(config, other, 1, 2, "--resume", "--stages", "align", *mesh)
    for name, loss in losses(two).items():
        assert loss == pytest.approx(losses(other)[name], abs=1e-5)
