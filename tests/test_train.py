"""The train command: what is skipped, what is refused, what signals and a full disk leave."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from dpo4rec_jax import train, workspace
from dpo4rec_jax.workspace import Stage, Workspace, write_safetensors

TINY_WORLD = "data: {name: synthetic, synthetic: {users: 40, items: 30, interactions: 20}}\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_WORLD)
    return path


def run(*arguments: str | Path) -> int:
    return train.main([str(argument) for argument in arguments])


def prepare(config: Path, workdir: Path, *more: str) -> int:
    return run("--config", config, "--workdir", workdir, "--stages", "prepare", *more)


def test_a_complete_stage_is_skipped_and_a_changed_one_runs(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    workdir = tmp_path / "w"
    assert prepare(config, workdir) == 0
    assert prepare(config, workdir) == 0
    assert "prepare: complete" in capsys.readouterr().err
    config.write_text(TINY_WORLD + "seed: 1\n")
    assert prepare(config, workdir) == 2
    assert "first difference: seed" in capsys.readouterr().err
    assert prepare(config, workdir, "--overwrite") == 0
    assert "prepare: running" in capsys.readouterr().err


def test_the_same_seed_prepares_the_same_bytes(config: Path, tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        assert prepare(config, tmp_path / name) == 0
        manifest = Workspace(tmp_path / name).manifest("prepare")
        assert manifest is not None
        digests.append(manifest["outputs_digest"])
    assert digests[0] == digests[1]


def test_a_damaged_artifact_is_named_with_the_stage_to_rerun(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    workdir = tmp_path / "w"
    assert prepare(config, workdir) == 0
    (workdir / "prepare" / "lists.npz").write_bytes(b"half")
    assert prepare(config, workdir) == 2
    assert "lists.npz: damaged or missing; rerun its stage: --stages prepare" in (
        capsys.readouterr().err
    )
    assert prepare(config, workdir, "--overwrite") == 0
    (workdir / "prepare" / "manifest.json").write_text("{")
    assert prepare(config, workdir) == 2
    assert "manifest.json: damaged; rerun its stage: --stages prepare --overwrite" in (
        capsys.readouterr().err
    )
    assert prepare(config, workdir, "--overwrite") == 0


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"]
)
def test_a_signal_stops_the_run_where_it_may_save(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    status: int,
) -> None:
    def stage(stage: Stage) -> None:
        with stage.progress.track("work", 2) as task:
            signal.raise_signal(number)
            (stage.directory / "saved").write_text("all")
            task.advance()

    monkeypatch.setattr("dpo4rec_jax.stages.prepare.run", stage)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert prepare(config, tmp_path / "w") == status
    assert "--resume" in capsys.readouterr().err
    assert (tmp_path / "w" / "prepare" / "saved").exists()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


def test_a_full_disk_says_what_to_do(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def npz(stage: Stage) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "w/x.npz")

    def arrays(stage: Stage) -> None:
        write_safetensors(stage.directory / "x.safetensors", {"x": np.ones(4)})

    def save_file(*_: object, **__: object) -> None:  # its words on a disk that was full
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    def library(stage: Stage) -> None:
        raise ValueError("w/orbax: No space left on device [os_error='ENOSPC']\nin some function")

    says = (
        (npz, "error: w/x.npz: No space left on device; make"),
        (arrays, f"error: {tmp_path}/w/prepare/x.safetensors: No space left on device; make"),
        (library, "error: w/orbax: No space left on device [os_error='ENOSPC']; make"),
    )
    monkeypatch.setattr(workspace, "save_file", save_file)
    for full, line in says:
        monkeypatch.setattr("dpo4rec_jax.stages.prepare.run", full)
        assert prepare(config, tmp_path / "w") == 2
        said = capsys.readouterr().err
        assert said.endswith(f"{line} room and continue with --resume\n")
        assert "Traceback" not in said


def test_a_workspace_in_use_is_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    code = (
        "import sys, time; from pathlib import Path; from dpo4rec_jax.workspace import Workspace\n"
        "with Workspace(Path(sys.argv[1])).locked():\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    workdir = tmp_path / "w"
    command = [sys.executable, "-c", code, str(workdir)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        assert prepare(config, workdir) == 2
    finally:
        holder.kill()
        holder.wait()
    assert f"workspace in use by process {holder.pid}" in capsys.readouterr().err
    assert prepare(config, workdir) == 0


def test_the_workspace_holds_the_resolved_config(config: Path, tmp_path: Path) -> None:
    assert prepare(config, tmp_path / "w", "--set", "rank.seeds=3") == 0
    assert "seeds: 3" in (tmp_path / "w" / "config.yaml").read_text()
    assert json.loads((tmp_path / "w" / "prepare" / "manifest.json").read_text())["files"]
