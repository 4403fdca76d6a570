"""Several processes as one run, with threads and a dictionary in their place."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rich.console import Console

from dpo4rec_jax.config import InputError
from dpo4rec_jax.runtime import processes
from dpo4rec_jax.runtime.processes import Failed, Failure, Processes, Silence, Stopped
from dpo4rec_jax.runtime.progress import Progress


class Dictionary:
    """What `processes.Store` does, within one process."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def set_once(self, key: str, value: str) -> None:
        with self.changed:
            self.values.setdefault(key, value)
            self.changed.notify_all()

    def get(self, key: str) -> str | None:
        return self.values.get(key)

    def wait(self, key: str) -> str | None:
        with self.changed:
            self.changed.wait_for(lambda: key in self.values, timeout=0.05)
            return self.values.get(key)

    def all(self, prefix: str) -> dict[str, str]:
        found = dict(self.values)
        return {k.rpartition("/")[2]: v for k, v in found.items() if k.startswith(prefix)}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Processes]]:
    """Three processes of one run."""
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.01)
    store: Any = Dictionary()
    run = [Processes(i, 3, store, threading.Event()) for i in range(3)]
    yield run
    for process in run:
        process._over.set()


def together(run: list[Processes], body: Callable[[Processes], Any]) -> list[Any]:
    """What `body` returns, or raises, in each process."""
    results: list[Any] = [None] * len(run)

    def call(index: int) -> None:
        try:
            results[index] = body(run[index])
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(run))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive()
    return results


def test_alone_there_is_nobody_to_wait_for() -> None:
    alone = Processes()
    alone.barrier("anything")
    assert alone.main
    assert alone.from_main(lambda: 7) == 7
    assert alone.leave(2) == 2
    failure = Failure("error: x", 2)
    assert alone.first(failure) is failure


def test_no_process_passes_a_barrier_before_all_are_there(run: list[Processes]) -> None:
    arrived: list[int] = []

    def body(process: Processes) -> int:
        time.sleep(0.05 * process.index)
        arrived.append(process.index)
        process.barrier("here")
        return len(arrived)

    assert together(run, body) == [3, 3, 3]


def test_what_the_main_process_finds_is_what_all_get(run: list[Processes]) -> None:
    def body(process: Processes) -> list[Any]:
        return [process.from_main(lambda n=n: [process.index, n]) for n in range(3)]

    assert together(run, body) == [[[0, 0], [0, 1], [0, 2]]] * 3


def test_nothing_is_told_after_a_failure(
    run: list[Processes], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.StringIO()
    progress = Progress(Console(file=written))
    monkeypatch.setattr(processes, "_this", run[0])
    progress.say("step")
    run[1].first(Failure("error: torn", 2))
    until = time.monotonic() + 20
    while not run[0].failed and time.monotonic() < until:  # which it notices by itself
        time.sleep(0.01)
    progress.say("align: 28 s so far")
    assert written.getvalue() == "step\n"


def test_a_process_started_otherwise_is_named(run: list[Processes]) -> None:
    def body(process: Processes) -> None:
        try:
            process.barrier("command", "b" if process.index == 2 else "a")
        except InputError as error:
            process.first(Failure(str(error), 2))
            raise

    main, *others = together(run, body)
    assert isinstance(main, InputError)
    assert "process 2: expected the command of process 0" in str(main)
    assert all(isinstance(other, Failed) for other in others)


def test_a_failure_ends_the_wait_of_all_others_with_its_line(run: list[Processes]) -> None:
    def body(process: Processes) -> str:
        if process.index == 1:
            return process.first(Failure("error: no such file", 2)).line
        try:
            process.barrier("never")
        except Failed as failed:
            return f"{failed.failure.line}, {failed.failure.status} of {failed.failure.process}"
        return "passed"

    expected = "error: no such file"
    assert together(run, body) == [f"{expected}, 2 of 1", expected, f"{expected}, 2 of 1"]


def test_of_several_failures_all_tell_the_first(run: list[Processes]) -> None:
    first = run[2].first(Failure("error: first", 2))
    assert run[0].first(Failure("error: later", 1)) == first == Failure("error: first", 2, 2)


def test_nobody_ends_before_the_others_end_or_are_gone(
    run: list[Processes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes.os, "_exit", sys.exit)  # of a thread
    ended: dict[int, float] = {}

    def leave(index: int, after: float) -> None:
        time.sleep(after)
        with pytest.raises(SystemExit):
            run[index].leave(2)
        ended[index] = time.monotonic()

    began = time.monotonic()
    threads = [threading.Thread(target=leave, args=each) for each in ((0, 0.0), (1, 0.3))]
    for thread in threads:
        thread.start()
    time.sleep(0.6)
    assert not ended
    run[0]._store.set("silent/2", "")  # type: ignore[union-attr]
    for thread in threads:
        thread.join(timeout=20)
    assert ended.keys() == {0, 1}
    assert min(ended.values()) - began >= 0.6


def test_an_echo_of_a_killed_process_names_that_one(run: list[Processes]) -> None:
    run[0]._store.set("silent/2", "")  # type: ignore[union-attr]
    found = run[1].first(Failure("process 1 failed: connection reset", 1), may_be_an_echo=True)
    assert found.line.startswith("process 2 stopped answering")


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_all_stop_at_the_same_lockstep_point(run: list[Processes], asked: int) -> None:
    """One is asked to stop, and the processes are up to two points apart when they learn of it."""

    def body(process: Processes) -> int:
        for point in range(1, 400):
            if process.index == asked and point == 20:
                process._stop_requested.set()
            time.sleep(0.002 * (1 + process.index % 2))
            if process.stops_here():
                return point
        return -1

    stopped = together(run, body)
    assert len(set(stopped)) == 1
    assert 20 <= stopped[0] < 399


def test_a_process_asked_to_stop_while_it_waits_stops_at_once(run: list[Processes]) -> None:
    run[1]._stop_requested.set()
    stopped = together(run[1:2], lambda process: process.barrier("never"))
    assert isinstance(stopped[0], Stopped)


def test_signs_of_life_that_no_longer_change_are_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(processes.time, "monotonic", lambda: now[0])
    silence = Silence()
    silence.listen({"0": "a", "1": "a"})
    now[0] += processes.SILENT_SECONDS + 1
    silence.listen({"0": "b", "1": "a"})
    assert silence.silent() == {"1"}
    assert silence.newly_silent() == {"1"}
    assert silence.newly_silent() == set()
    silence.listen({"1": "b"})
    assert silence.silent() == set()
