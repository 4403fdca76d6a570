"""What every command does before it begins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpo4rec_jax import __main__ as overview
from dpo4rec_jax.command import OUR_MALLOC

PROGRAM = """
import os, sys
from dpo4rec_jax import command

print("starts", flush=True)
command.settle_malloc()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1])
"""


@pytest.mark.parametrize(
    ("users", "said"),
    [
        (None, ["starts", "starts", f"{OUR_MALLOC} kept"]),
        ("glibc.malloc.check=1", ["starts", "glibc.malloc.check=1 kept"]),
    ],
)
def test_a_command_starts_anew_with_malloc_set(users: str | None, said: list[str]) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environment |= {} if users is None else {"GLIBC_TUNABLES": users}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, "kept"],
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
