"""The workspace: manifests last and atomic, digests that notice damage, one process at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dpo4rec_jax.config import Config, InputError
from dpo4rec_jax.workspace import Workspace, digest_of_path, write_json, write_jsonl, write_npz


def test_a_stage_is_complete_only_after_a_clean_exit(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    with pytest.raises(RuntimeError), workspace.running("rank", 0, {}, keep_partial=False):
        raise RuntimeError
    assert workspace.manifest("rank", 0) is None
    with workspace.running("rank", 0, {"a": 1}, keep_partial=False) as directory:
        (directory / "x.txt").write_text("x")
        assert workspace.manifest("rank", 0) is None
    manifest = workspace.manifest("rank", 0)
    assert manifest is not None
    assert list(manifest["files"]) == ["x.txt"]
    assert manifest["inputs"] == {"a": 1}


@pytest.mark.parametrize(
    ("keep", "inputs", "kept"), [(True, 1, True), (True, 2, False), (False, 1, False)]
)
def test_partial_files_stay_only_for_the_same_inputs(
    tmp_path: Path, keep: bool, inputs: int, kept: bool
) -> None:
    workspace = Workspace(tmp_path)
    with (
        pytest.raises(RuntimeError),
        workspace.running("reason", 0, {"i": 1}, keep_partial=True) as d,
    ):
        (d / "part").write_text("half")
        raise RuntimeError
    with workspace.running("reason", 0, {"i": inputs}, keep_partial=keep) as directory:
        assert (directory / "part").exists() is kept


@pytest.mark.parametrize("damage", ["delete", "truncate", "flip"])
def test_damage_to_a_complete_stage_is_named(tmp_path: Path, damage: str) -> None:
    workspace = Workspace(tmp_path)
    with workspace.running("encode", 1, {}, keep_partial=False) as directory:
        (directory / "v.bin").write_bytes(bytes(100))
    assert workspace.damaged("encode", 1) is None
    file = workspace.stage_dir("encode", 1) / "v.bin"
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(bytes(50) if damage == "truncate" else bytes(99) + b"x")
    assert workspace.damaged("encode", 1) == file


def test_files_at_the_top_belong_to_the_stage_that_left_them(tmp_path: Path) -> None:
    workspace, report = Workspace(tmp_path), tmp_path / "report.html"
    with workspace.running("report", None, {}, keep_partial=False, outside=["report.html"]):
        report.write_text("whole")
    assert workspace.damaged("report", None) is None
    report.write_text("half")
    assert workspace.damaged("report", None) == report


def test_what_a_killed_run_was_writing_is_no_artifact(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    with pytest.raises(RuntimeError), workspace.running("rank", 0, {}, keep_partial=True) as d:
        (d / ".x.npz.12.tmp").write_text("ha")
        raise RuntimeError
    (tmp_path / ".report.html.12.tmp").write_text("ha")
    with workspace.running("rank", 0, {}, keep_partial=True):
        pass
    manifest = workspace.manifest("rank", 0)
    assert manifest is not None and manifest["files"] == {}
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_config_that_was_cut_short_is_mended(tmp_path: Path) -> None:
    workspace, config = Workspace(tmp_path), Config()
    workspace.adopt(config, overwrite=False)
    whole = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(whole[:100])
    assert workspace.adopt(config, overwrite=False) is True
    assert (tmp_path / "config.yaml").read_text() == whole


def test_equal_outputs_have_equal_digests_whatever_the_time(tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        workspace = Workspace(tmp_path / name)
        with workspace.running("rank", 0, {}, keep_partial=False) as directory:
            write_npz(directory / "a.npz", {"a": np.arange(3)})
        manifest = workspace.manifest("rank", 0)
        assert manifest is not None
        digests.append(manifest["outputs_digest"])
    assert digests[0] == digests[1]


def test_a_second_process_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from dpo4rec_jax.workspace import Workspace\n"
        "with Workspace(Path(sys.argv[1])).locked():\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"in use by process {holder.pid}"):
        Workspace(tmp_path).locked().__enter__()
    holder.kill()
    holder.wait()
    with Workspace(tmp_path).locked():
        pass


def test_another_config_needs_overwrite_and_the_difference_is_named(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    one, two = Config(), Config.model_validate({"rank": {"backbone": "dlcm"}})
    assert workspace.adopt(one, overwrite=False) is False
    assert workspace.adopt(one, overwrite=False) is True
    with pytest.raises(InputError, match=r"another config \(first difference: rank.backbone\)"):
        workspace.adopt(two, overwrite=False)
    assert workspace.adopt(two, overwrite=True) is False
    assert workspace.adopt(two, overwrite=False) is True


@pytest.mark.parametrize("method", ["lora", "full"])
def test_policy_of_a_round_is_base_plus_what_alignment_left(tmp_path: Path, method: str) -> None:
    workspace = Workspace(tmp_path)
    config = Config.model_validate({"policy": {"path": "hub/model"}, "align": {"method": method}})
    assert workspace.policy_source(config, 0) == ("hub/model", ())
    path, adapters = workspace.policy_source(config, 2)
    if method == "lora":
        assert path == "hub/model"
        assert adapters == tuple(tmp_path / f"round{r}" / "align" / "adapter" for r in (0, 1))
    else:
        assert (path, adapters) == (str(tmp_path / "round1" / "align" / "policy"), ())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [{"a": 1}])

    def breaking():
        yield {"a": 2}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_jsonl(path, breaking())
    assert path.read_text() == '{"a": 1}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.jsonl"]


def test_nan_never_reaches_a_json_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"a": float("nan")})


def test_digest_of_a_directory_sees_every_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    before = digest_of_path(tmp_path)
    (tmp_path / "b").write_text("2")
    assert digest_of_path(tmp_path) != before
    assert digest_of_path(tmp_path / "nothing") is None


def test_manifest_is_json_with_what_the_report_needs(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    with workspace.running("prepare", None, {}, keep_partial=False):
        pass
    manifest = json.loads((tmp_path / "prepare" / "manifest.json").read_text())
    assert manifest["seconds"] >= 0
    assert manifest["code"]
