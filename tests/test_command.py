"""What every command does before it begins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpo4rec_jax import __main__ as overview

PROGRAM = """
import os, sys
from pathlib import Path
from dpo4rec_jax import command

command.TRANSPARENT_HUGE_PAGES = Path(sys.argv[1])
print("starts", flush=True)
command.use_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[2])
"""


@pytest.mark.parametrize(
    ("kernel", "users", "said"),
    [
        ("always [madvise] never", None, ["starts", "starts", "glibc.malloc.hugetlb=1 kept"]),
        ("always [madvise] never", "glibc.malloc.check=1", ["starts", "glibc.malloc.check=1 kept"]),
        ("[always] madvise never", None, ["starts", "None kept"]),
        (None, None, ["starts", "None kept"]),
    ],
)
def test_a_command_starts_anew_under_huge_pages_where_they_must_be_asked_for(
    kernel: str | None, users: str | None, said: list[str], tmp_path: Path
) -> None:
    if kernel is not None:
        (tmp_path / "enabled").write_text(kernel + "\n")
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environment |= {} if users is None else {"GLIBC_TUNABLES": users}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "enabled", "kept"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.returncode, ran.stdout.splitlines()) == (0, said), ran.stderr


def test_every_command_is_named(capsys: pytest.CaptureFixture) -> None:
    overview.main()
    _, _, *lines = capsys.readouterr().out.splitlines()
    package = Path(overview.__file__).parent
    commands = {
        path.stem
        for path in package.glob("[!_]*.py")
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    }
    described = dict(line.split(maxsplit=1) for line in lines)
    assert described.keys() == commands
    assert all(described.values())
