"""Runs that are killed, starved of disk and lied to come back to the same report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).parents[2] / "tools" / "chaos.py"


@pytest.mark.slow
def test_fifteen_disturbed_runs_lose_nothing() -> None:
    command = [sys.executable, str(CHAOS), "--kills", "15", "--seed", "0", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["lost"] == 0
    assert summary["equal"] + summary["refused_then_equal"] == 15
