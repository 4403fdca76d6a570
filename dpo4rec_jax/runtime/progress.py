"""What a running stage tells: progress bars or plain lines, and the metrics log."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from dpo4rec_jax.runtime.processes import Stopped, this
from dpo4rec_jax.runtime.tensorboard import EventFile
from dpo4rec_jax.runtime.tracking import Tracker

SECONDS_BETWEEN_LINES = 10.0
SILENCE_SECONDS = 20.0  # after which a step without a line says that it is alive


class Task:
    """One counted piece of work; `advance` is also where a stop request takes effect."""

    def __init__(
        self, progress: Progress, description: str, total: int, unit: str, lockstep: bool = False
    ):
        self._progress, self._description, self._total, self._unit = (
            progress,
            description,
            total,
            unit,
        )
        self._lockstep = lockstep
        self._done = self._first = 0
        self._began = self._line_at = self._first_at = time.monotonic()
        self._bar = progress.begin_bar(f"  {description}", total)

    def advance(self, n: int = 1, **figures: float) -> None:
        """Counts n more units done; figures are shown beside the count. Raises Stopped."""
        now = time.monotonic()
        if not self._done:  # it took the compilation as well
            self._first, self._first_at = n, now
        self._done += n
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        speed = f"{self._done / max(now - self._began, 1e-9):.3g} {self._unit}/s"
        self._progress.move_bar(self._bar, n, f"{speed}  {shown}".rstrip())
        if not self._progress.interactive and now - self._line_at >= SECONDS_BETWEEN_LINES:
            self._line_at = now
            self._progress.say(f"  {self._description}: {self._rate(now)}  {shown}".rstrip())
        if self._stops_here():
            raise Stopped

    def _stops_here(self) -> bool:
        if self._lockstep and this().count > 1:
            return this().stops_here()
        this().check()
        return self._progress.stop_requested.is_set()

    def _rate(self, now: float) -> str:
        rate = self._done / max(now - self._began, 1e-9)
        later = (self._done - self._first) / max(now - self._first_at, 1e-9)
        left = (self._total - self._done) / later if later else math.inf
        left_text = f"{left:.0f} s left" if math.isfinite(left) else "time left unknown"
        return f"{self._done}/{self._total} {self._unit} ({rate:.3g}/s, {left_text})"


class Progress:
    """Bars on a terminal, a step's tasks under the step; elsewhere a plain line every 10 s.

    The stop request is thread-safe. Of several processes, the main one tells.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True, highlight=False)
        self.interactive = self.console.is_terminal and not os.environ.get("CI")
        self.stop_requested = threading.Event()
        self._rich: RichProgress | None = None
        self._said_at = time.monotonic()

    def say(self, line: str) -> None:
        """Shows a line, unless another process tells, or the run has failed."""
        self._said_at = time.monotonic()
        if this().main and not this().failed:
            self.console.print(line, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def step(self, name: str, place: int, total: int) -> Iterator[None]:
        """Around step `place` of `total`: its bar stands over those of its tasks. Where there are
        no bars, a step that compiles or loads in silence says every 20 s that it is alive."""
        began, over = time.monotonic(), threading.Event()
        bar = self.begin_bar(f"{name} ({place} of {total})", total, place - 1)

        def remind() -> None:
            while not over.wait(max(self._said_at + SILENCE_SECONDS - time.monotonic(), 0.05)):
                if time.monotonic() - self._said_at >= SILENCE_SECONDS:
                    self.say(f"  {name}: {time.monotonic() - began:.0f} s so far")

        reminder = threading.Thread(target=remind, daemon=True)
        if not self.interactive:
            reminder.start()
        try:
            yield
        finally:
            over.set()
            if reminder.is_alive():
                reminder.join()
            self.end_bar(bar)

    @contextlib.contextmanager
    def track(
        self, description: str, total: int, unit: str = "", *, lockstep: bool = False
    ) -> Iterator[Task]:
        """A Task of `total` units; several may be open at once (nested bars). `lockstep`: every
        process advances it alike, and all stop at the same place."""
        task = Task(self, description, total, unit, lockstep)
        try:
            yield task
        finally:
            self.end_bar(task._bar)

    def begin_bar(self, description: str, total: int, done: int = 0) -> int | None:
        if not (self.interactive and this().main):
            return None
        if self._rich is None:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[shown]}"),
            )
            self._rich = RichProgress(*columns, console=self.console, transient=True)
            self._rich.start()
        return self._rich.add_task(description, total=total, completed=done, shown="")

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
    """Appends to metrics.jsonl and to TensorBoard events, for one stage of one round; to `tracker`
    as well where there is one. Of several processes, the main one writes."""

    def __init__(
        self, directory: Path, stage: str, round: int | None, tracker: Tracker | None = None
    ):
        self._directory, self._stage, self._round = directory, stage, round
        self._tracker = tracker
        self._path = directory / "metrics.jsonl"
        self._tensorboard = None
        self._lock = threading.Lock()
        if this().main:
            _drop_cut_line(self._path)

    def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """One line: time, stage, round, step and the values (NaN and infinities as null)."""
        if not this().main:
            return
        finite = {
            name: float(value) if math.isfinite(value) else None for name, value in values.items()
        }
        line = {"time": time.time(), "stage": self._stage, "round": self._round, "step": step}
        with self._lock:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line | finite) + "\n")
            self._add_to_tensorboard(step, finite)
            if self._tracker is not None:
                self._tracker.log(self._prefix, step, finite)

    @property
    def _prefix(self) -> str:
        return self._stage if self._round is None else f"round{self._round}/{self._stage}"

    def _add_to_tensorboard(self, step: int, values: Mapping[str, float | None]) -> None:
        if self._tensorboard is None:
            self._tensorboard = EventFile(self._directory / "tb")
        shown = {f"{self._prefix}/{name}": v for name, v in values.items() if v is not None}
        self._tensorboard.add(step, shown)

    def rewind(self, step: int) -> None:
        """Drops this stage's lines from `step` on, which a continued run writes again."""
        entries = self._entries()
        self._rewrite(line for line, entry in entries if not (entry and entry["step"] >= step))

    def settle(self) -> None:
        """Of what a continued run wrote again, under the same step and names, the last stays."""
        last = {_what(line, entry): line for line, entry in self._entries()}
        self._rewrite(last.values())

    def _entries(self) -> list[tuple[str, dict[str, Any] | None]]:
        """The lines, and this stage's own parsed; what is no JSON is left out."""
        found = []
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        for line in text.splitlines(keepends=True):
            with contextlib.suppress(json.JSONDecodeError):
                entry = json.loads(line)
                own = (entry.get("stage"), entry.get("round")) == (self._stage, self._round)
                found.append((line, entry if own else None))
        return found

    def _rewrite(self, lines: Iterable[str]) -> None:
        if not this().main:
            return
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        temporary.write_text("".join(lines), encoding="utf-8")
        temporary.replace(self._path)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None


def _what(line: str, entry: dict[str, Any] | None) -> Hashable:
    return line if entry is None else (entry["step"], *(name for name in entry if name != "time"))


def _drop_cut_line(path: Path) -> None:
    """What a killed run was writing, without its line end, would swallow the next line."""
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
