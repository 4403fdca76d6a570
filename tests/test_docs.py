"""The worked examples of docs/ do what they say: their blocks are written and run, in order.

A block whose first line is `# file: NAME` is that file; a bash block is run line by line. Commands
run in this process, which has jax loaded and compiled programs at hand.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo4rec_jax.data import columns

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FILE = re.compile(r"# file: (\S+)\n")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # a command starts itself anew only where it is unset
    return tmp_path


def blocks(document: str) -> list[tuple[str, str]]:
    """(language, content) of every fenced block."""
    text = (DOCS / document).read_text(encoding="utf-8")
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def follow(document: str) -> None:
    """Does what the document says; its files are all written first."""
    running: list[subprocess.Popen] = []
    found = blocks(document)
    for _, content in found:
        if named := FILE.match(content):
            Path(named.group(1)).write_text(content, encoding="utf-8")
    try:
        for language, content in found:
            for line in content.splitlines() if language == "bash" else ():
                running += run_line(line)
    finally:
        for process in running:
            process.kill()
            process.wait()


def run_line(line: str) -> list[subprocess.Popen]:
    """`python ...`, in this process and to exit status 0; with `&` in another, once it listens."""
    words = shlex.split(line)
    assert words[0] == "python", line
    if words[-1] == "&":
        process = subprocess.Popen([sys.executable, *words[1:-1]])
        wait_until_it_listens(int(words[-2]))
        return [process]
    before = sys.argv
    try:
        if words[1] == "-m":
            sys.argv = words[2:]
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words[1:]
            runpy.run_path(words[1], run_name="__main__")
    except SystemExit as end:
        assert not end.code, f"{line}: exit status {end.code}"
    finally:
        sys.argv = before
    return []


def wait_until_it_listens(port: int, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
        except OSError:
            assert time.monotonic() < until, f"nothing listens on port {port}"
            time.sleep(0.1)


def lines(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def methods(workdir: str) -> list[str]:
    report = json.loads((Path(workdir) / "report.json").read_text(encoding="utf-8"))
    return [row["method"] for row in report["rows"]]


def test_the_common_names_of_columns_are_those_that_are_guessed() -> None:
    text = (DOCS / "data.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\w+) \| (`.*`) \|$", text, flags=re.MULTILINE))
    for column, names in (columns.NAMES | columns.ATTRIBUTES).items():
        assert tuple(re.findall(r"`(\w+)`", rows[column])) == names


@pytest.mark.slow
def test_your_own_data_runs_from_csv_to_scores() -> None:
    follow("bring-your-own-data.md")
    assert methods("runs/songs") == ["backbone", "kar", "dpo4rec-1"]
    assert [len(line["scores"]) for line in lines("scores.jsonl")] == [4, 3]


@pytest.mark.slow
def test_your_own_llm_is_aligned_and_an_endpoint_and_a_file_take_its_place() -> None:
    follow("bring-your-own-llm.md")
    assert methods("runs/llm") == ["backbone", "kar", "dpo4rec-1"]
    assert (Path("aligned") / "model.safetensors").exists()
    for workdir, words in (("runs/endpoint", "the viewer likes loved"), ("runs/texts", "dramas")):
        assert methods(workdir) == ["backbone", "kar"]
        texts = lines(f"{workdir}/round0/reason/users.jsonl")
        assert all(words in line["text"] for line in texts)


@pytest.mark.slow
def test_a_backbone_that_the_docs_define_is_trained_as_they_say() -> None:
    from dpo4rec_jax.models.backbones import BACKBONES

    try:
        follow("extending.md")
    finally:
        BACKBONES.pop("deep-sets", None)
    for name in ("deep-sets", "mir"):
        members = json.loads(Path(f"runs/{name}/round0/rank/kar.json").read_text())
        assert members["backbone"] == name
        loss = members["loss_by_epoch"]
        assert max(loss[-1]) < min(loss[0])


def test_the_docs_show_mir_as_it_is() -> None:
    shown = next(text for _, text in blocks("extending.md") if text.startswith("# file: mir.py"))
    source = (ROOT / "dpo4rec_jax" / "models" / "mir.py").read_text(encoding="utf-8")
    assert FILE.sub("", shown, count=1) == source
    assert len(source.splitlines()) < 100
    table = (ROOT / "dpo4rec_jax" / "models" / "backbones.py").read_text(encoding="utf-8")
    assert '    "mir": "dpo4rec_jax.models.mir:MIR",\n' in table


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_help_is_one_screen_and_names_every_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo4rec_jax import train

    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) <= 24
    assert max(map(len, shown)) <= 100
    options = ("--config", "--workdir", "--set", "--stages", "--resume", "--overwrite", "--dry-run")
    for word in (*options, "report.html", "configs/", "docs/configuration.md", "Exit status"):
        assert any(word in line for line in shown), word
