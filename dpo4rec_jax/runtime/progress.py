"""What a running stage tells: progress bars or plain lines, and the metrics log."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import SupportsFloat

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

SECONDS_BETWEEN_LINES = 10.0


class Stopped(BaseException):
    """SIGTERM arrived; raised at the next `Task.advance`, where stages may save and re-raise."""


class Task:
    """One counted piece of work; `advance` is also where a stop request takes effect."""

    def __init__(self, progress: Progress, description: str, total: int, unit: str):
        self._progress, self._description, self._total, self._unit = (
            progress,
            description,
            total,
            unit,
        )
        self._done = 0
        self._began = self._line_at = time.monotonic()
        self._bar = progress.begin_bar(description, total)

    def advance(self, n: int = 1, **figures: float) -> None:
        """Counts n more units done; figures are shown beside the count. Raises Stopped."""
        self._done += n
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self._progress.move_bar(self._bar, n, shown)
        now = time.monotonic()
        if not self._progress.interactive and now - self._line_at >= SECONDS_BETWEEN_LINES:
            self._line_at = now
            self._progress.say(f"  {self._description}: {self._rate(now)}  {shown}".rstrip())
        if self._progress.stop_requested.is_set():
            raise Stopped

    def _rate(self, now: float) -> str:
        rate = self._done / max(now - self._began, 1e-9)
        left = (self._total - self._done) / rate if rate else math.inf
        left_text = f"{left:.0f} s left" if math.isfinite(left) else "time left unknown"
        return f"{self._done}/{self._total} {self._unit} ({rate:.3g}/s, {left_text})"


class Progress:
    """Bars on a terminal, a plain line every 10 s elsewhere. Thread-safe stop request."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True, highlight=False)
        self.interactive = self.console.is_terminal and not os.environ.get("CI")
        self.stop_requested = threading.Event()
        self._rich: RichProgress | None = None

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)

    @contextmanager
    def track(self, description: str, total: int, unit: str = "") -> Iterator[Task]:
        """A Task of `total` units; several may be open at once (nested bars)."""
        task = Task(self, description, total, unit)
        try:
            yield task
        finally:
            self.end_bar(task._bar)

    def begin_bar(self, description: str, total: int) -> int | None:
        if not self.interactive:
            return None
        if self._rich is None:
            columns = (
                TextColumn("  {task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[shown]}"),
            )
            self._rich = RichProgress(*columns, console=self.console, transient=True)
            self._rich.start()
        return self._rich.add_task(description, total=total, shown="")

    def move_bar(self, bar: int | None, n: int, shown: str) -> None:
        if self._rich is not None and bar is not None:
            self._rich.update(bar, advance=n, shown=shown)  # type: ignore[arg-type]

    def end_bar(self, bar: int | None) -> None:
        if self._rich is None or bar is None:
            return
        self._rich.remove_task(bar)  # type: ignore[arg-type]
        if not self._rich.tasks:
            self._rich.stop()
            self._rich = None


class MetricsLog:
    """Appends to metrics.jsonl and to TensorBoard events, for one stage of one round."""

    def __init__(self, directory: Path, stage: str, round: int | None):
        self._directory, self._stage, self._round = directory, stage, round
        self._path = directory / "metrics.jsonl"
        self._tensorboard = None
        self._lock = threading.Lock()

    def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """One line: time, stage, round, step and the values (NaN and infinities as null)."""
        finite = {
            name: float(value) if math.isfinite(value) else None for name, value in values.items()
        }
        line = {"time": time.time(), "stage": self._stage, "round": self._round, "step": step}
        with self._lock:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line | finite) + "\n")
            self._add_to_tensorboard(step, finite)

    def _add_to_tensorboard(self, step: int, values: Mapping[str, float | None]) -> None:
        if self._tensorboard is None:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(self._directory / "tb"))
        prefix = self._stage if self._round is None else f"round{self._round}/{self._stage}"
        for name, value in values.items():
            if value is not None:
                self._tensorboard.add_scalar(f"{prefix}/{name}", value, step)

    def rewind(self, step: int) -> None:
        """Drops this stage's lines from `step` on, which a continued run writes again."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a killed run may be cut
            same = (entry.get("stage"), entry.get("round")) == (self._stage, self._round)
            if not (same and entry["step"] >= step):
                kept.append(line + "\n")
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(self._path)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
