"""The train command: what bad input gets, what is skipped, what a kill leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dpo4rec_jax import train
from dpo4rec_jax.workspace import Workspace

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "rank.backbon=prm"], "rank.backbon: unknown key; did you mean rank.backbone?"),
        (["--set", "rank.backbone=gru4rec"], "rank.backbone: input should be 'dlcm', 'prm'"),
        (["--set", "rounds=many"], "rounds: input should be a valid integer"),
        (["--stages", "prepare,rang"], "--stages rang: unknown stage; known: prepare, warmup"),
        (["--stages", "rank"], "reads prepare, which is not complete; run it first"),
        (["--set", "data.path=/nowhere/ml-1m.zip"], "/nowhere/ml-1m.zip"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list, message: str
) -> None:
    assert run("--config", config, "--workdir", tmp_path / "w", *arguments) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_a_mistake_on_the_command_line_has_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dpo4rec_jax.train", "--config", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    expected = "cannot read the config: No such file or directory; check --config"
    assert done.stderr == f"error: {tmp_path / 'none.yaml'}: {expected}\n"


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
