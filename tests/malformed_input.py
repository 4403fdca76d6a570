"""One row of the tables of malformed input: how to make it, and what a command then says.

Every row is given to a command as a user would give it. The command must exit with status 2 and
end with one line that shows where, what was expected, what was found or what to do; it must print
no traceback and leave nothing half-written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# What a stage that was refused may leave: what marks it as unfinished, and whole texts.
LEFT_UNFINISHED = re.compile(r"partial\.json|(users|items)\.part\d+\.jsonl")


@dataclass(frozen=True)
class Malformed:
    """`make` prepares the input, in a directory as a rule, and returns arguments of the command."""

    name: str
    make: Callable[[Any], Sequence[str]]
    says: str  # a pattern that the line must match


def rows(*table: Malformed) -> Any:
    """Parametrizes a test by a table, whose names must differ."""
    names = [row.name for row in table]
    assert len(set(names)) == len(names), sorted(n for n in names if names.count(n) > 1)
    return pytest.mark.parametrize("row", table, ids=names)


def write(directory: Path, files: dict[str, str | bytes]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        raw = content if isinstance(content, bytes) else content.encode()
        (directory / name).write_bytes(raw)
    return directory


def settings(**values: Any) -> list[str]:
    """`--set` for each key, with dots written as double underscores."""
    return [
        word for key, v in values.items() for word in ("--set", f"{key.replace('__', '.')}={v}")
    ]


def check_refusal(status: int, said: str, says: str, workdir: Path) -> None:
    """Asserts what a table promises of the exit status, stderr and the workspace."""
    *_, last = said.splitlines() or [""]
    assert status == 2, (status, said)
    assert last.startswith("error: "), said
    assert re.search(says, last), f"expected {says!r}, got {last!r}"
    assert said.count("error: ") == last.count("error: ")
    assert "Traceback" not in said
    for path in workdir.rglob("*") if workdir.is_dir() else ():
        assert not path.name.endswith((".tmp", ".partial")), path
        unfinished = path.is_file() and (path.parent / "partial.json").exists()
        assert not unfinished or LEFT_UNFINISHED.fullmatch(path.name), path
