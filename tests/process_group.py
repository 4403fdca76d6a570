"""A command run as several real processes of simulated devices, which meet on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 900


def start(
    count: int, devices: int, arguments: Sequence[str], code: str | None = None
) -> list[subprocess.Popen[str]]:
    """`count` processes of `devices` each; `code` in place of the train command gets its arguments.

    One process is told of no others.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices}"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    what = ["-m", "dpo4rec_jax.train"] if code is None else ["-c", code]
    found = []
    for index in range(count):
        if count > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            }
        command = [sys.executable, *what, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        found.append(subprocess.Popen(command, env=environment, **pipes))
    return found


def finish(group: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit status and output of each process."""
    return [(p.returncode, out) for p in group for out, _ in [p.communicate(timeout=LIMIT_SECONDS)]]


def on_eight_devices(code: str, *arguments: object) -> str:
    """What a script prints in a process of its own, of eight simulated devices."""
    status, output = finish(start(1, 8, list(map(str, arguments)), code))[0]
    assert status == 0, output[-3000:]
    return output
