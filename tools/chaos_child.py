"""A run of train with a fault planted in it; `tools/chaos.py` starts it.

    python tools/chaos_child.py '{"kill_at": 37, "workdir": "w"}' --config C --workdir w

Faults: `kill_at` n: SIGKILL before the n-th change to a file below `workdir`; `count` path: no
fault, but the number of changes before each manifest goes there; `clock` seconds: what every clock
of the process that tells the date is wrong by.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR
# Audit events (PEP 578) of calls that change a directory, and which of their arguments is a path.
CHANGES = {"os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "os.truncate": 0}


def main() -> int:
    fault: dict[str, Any] = json.loads(sys.argv[1])
    if "clock" in fault:
        right = time.time
        time.time = lambda: right() + fault["clock"]
    if "kill_at" in fault or "count" in fault:
        watch(fault)

    from dpo4rec_jax import train

    return train.main(sys.argv[2:])


def watch(fault: dict[str, Any]) -> None:
    """Counts changes to files of the workspace as they are about to happen."""
    inside = Path(fault["workdir"]).resolve()
    kill_at, changes, counts = fault.get("kill_at"), 0, []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        if event == "open":
            path, flags = arguments[0], arguments[2]
            if not isinstance(flags, int) or not flags & WRITING:
                return
        elif event in CHANGES:
            path = arguments[CHANGES[event]]
        else:
            return
        if not isinstance(path, str | os.PathLike) or inside not in Path(path).absolute().parents:
            return
        changes += 1
        if changes == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "os.rename" and Path(path).name == "manifest.json":
            counts.append(changes)
            if "count" in fault:
                Path(fault["count"]).write_text(json.dumps(counts), encoding="utf-8")

    sys.addaudithook(hook)


if __name__ == "__main__":
    sys.exit(main())
