"""Weights & Biases, for those who ask for it (`runtime.wandb`) and have it installed."""

from __future__ import annotations

import contextlib
import importlib
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpo4rec_jax.config import Config, InputError

RUN_ID = "wandb.id"


class Tracker:
    """One W&B run of a workspace; every stage of every round has an axis of steps of its own."""

    def __init__(self, wandb: Any):
        self._wandb = wandb
        self._known: set[str] = set()
        self._lock = threading.Lock()

    def log(self, prefix: str, step: int, values: Mapping[str, float | None]) -> None:
        """The figures of `round0/align`, say, at its own step; None (not finite) is left out."""
        axis = f"{prefix}/step"
        with self._lock:
            if prefix not in self._known:
                self._known.add(prefix)
                self._wandb.define_metric(axis)
                self._wandb.define_metric(f"{prefix}/*", step_metric=axis)
            shown = {f"{prefix}/{name}": v for name, v in values.items() if v is not None}
            self._wandb.log({axis: step, **shown})


@contextlib.contextmanager
def tracking(config: Config, workspace: Path) -> Iterator[Tracker | None]:
    """The tracker that the config asks for, or None. A continued run continues its W&B run.

    Raises InputError where the package is not installed or does not let us in.
    """
    project = config.runtime.wandb
    if project is None or not _is_first_process():
        yield None
        return
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise InputError(
            "runtime.wandb: the package wandb is not installed; install it, or set runtime.wandb: "
            "null"
        ) from None
    try:
        wandb.init(
            project=project,
            name=config.name,
            id=_run_id(workspace / RUN_ID),
            resume="allow",
            dir=str(workspace),
            config=config.model_dump(mode="json"),
        )
    except Exception as error:  # wandb's own kinds: no key, no such project, no network
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"runtime.wandb: {project!r}: {reason}; log in, set WANDB_MODE=offline, or set "
            "runtime.wandb: null"
        ) from None
    status = 1
    try:
        yield Tracker(wandb)
        status = 0
    finally:
        wandb.finish(exit_code=status)


def _is_first_process() -> bool:
    import jax  # late: a command that only prints its help does not wait for it

    return jax.process_index() == 0


def _run_id(path: Path) -> str:
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
