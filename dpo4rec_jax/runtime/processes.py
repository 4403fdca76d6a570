"""The processes of a run: who they are, which one writes, and none left waiting for a failed one.

They meet in the coordination service that `jax.distributed` starts in process 0. Its key-value
store carries barriers, small values and the first failure of any of them. A thread of each process
watches for that failure: a collective whose peer is gone may wait for ever, so a process that does
not end by itself is ended, with the line of the one that failed. A process that is killed leaves no
line; jax's own heartbeat then ends the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from dpo4rec_jax.config import InputError

T = TypeVar("T")

POLL_SECONDS = 1.0
SILENT_SECONDS = 10.0  # without a sign of life, a process is named as the likely culprit
GRACE_SECONDS = 10.0  # from another's failure to the end of a process that does not notice it
LINGER_SECONDS = 20.0  # the longest that a process which ends waits for the others to end as well


class Stopped(BaseException):
    """SIGTERM arrived; raised where stages may save and re-raise."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """What ends a run: the line a person reads and the exit status, from one of its processes."""

    line: str
    status: int
    process: int = 0


class Failed(BaseException):
    """Another process failed; there is nothing to save and nobody to save it with."""

    def __init__(self, failure: Failure):
        super().__init__(failure.line)
        self.failure = failure


class Processes:
    """This process among those of the run, counted from 0; alone unless it was given a store.

    All processes must pass the same barriers, values and lockstep points in the same order.
    """

    def __init__(
        self,
        index: int = 0,
        count: int = 1,
        store: Store | None = None,
        stop_requested: threading.Event | None = None,
    ):
        self.index, self.count = index, count
        self._store = store
        self._stop_requested = stop_requested or threading.Event()
        self._lock = threading.Lock()
        self._point = 0
        self._stop_at: int | None = None
        self._failure: Failure | None = None
        self._failure_seen = 0.0
        self._silence = Silence()
        self._over = threading.Event()
        if store is not None:
            threading.Thread(target=self._watch, name="watch", daemon=True).start()

    @property
    def main(self) -> bool:
        """Whether this is the one process that writes what all share."""
        return self.index == 0

    @property
    def failed(self) -> bool:
        """Whether the run is over by a failure, whose line is the last that a person should see."""
        return self._failure is not None

    def barrier(self, name: str, value: str = "", *, while_stopping: bool = False) -> None:
        """Returns when every process is here. Raises InputError where their values differ, Failed
        where another process ends instead of coming and, unless it serves that, Stopped."""
        if self._store is None:
            return
        point, said = self._next_point(), json.dumps([name, value])
        if not self.main:
            self._store.set(f"at/{point}/{self.index}", said)
            self._get(f"at/{point}/passed", while_stopping)
        else:
            for other in range(1, self.count):
                got = self._get(f"at/{point}/{other}", while_stopping)
                if got != said:
                    what = name if json.loads(got)[0] == name else f"{name} and {got}"
                    raise InputError(
                        f"process {other}: expected the {what} of process 0, got another; start "
                        "every process with the same command, code and files"
                    )
            self._store.set(f"at/{point}/passed", "")
        if self._stops(point) and not while_stopping:
            raise Stopped

    def from_main(self, compute: Callable[[], T]) -> T:
        """What `compute` gives in process 0, the only one to call it: a small JSON-able value."""
        if self._store is None:
            return compute()
        point = self._next_point()
        if self.main:
            value = compute()
            self._store.set(f"at/{point}/value", json.dumps(value))
            return value
        return json.loads(self._get(f"at/{point}/value"))

    def stops_here(self) -> bool:
        """True at the one lockstep point at which all processes stop, once any is asked to."""
        if self._store is None:
            return self._stop_requested.is_set()
        self.check()
        return self._stops(self._next_point())

    def check(self) -> None:
        """Raises Failed where another process has failed."""
        if self._failure is not None:
            raise Failed(self._failure)

    def first(self, failure: Failure, *, may_be_an_echo: bool = False) -> Failure:
        """Makes a failure known to all, and returns the one that came first.

        `may_be_an_echo`: of a process that failed or was killed while this one worked with it; that
        one is then looked for before this one is made known.
        """
        if self._store is None:
            return failure
        failure = dataclasses.replace(failure, process=self.index)
        if may_be_an_echo:
            failure = self._culprit() or failure
        self._store.set_once("failure", json.dumps(dataclasses.asdict(failure)))
        self._failure = _failure(self._store.get("failure")) or failure
        return self._failure

    def leave(self, status: int) -> int:
        """Ends the part of this process in the run and returns the status. With another status than
        0 the process ends here: the usual way out would wait for processes that no longer come."""
        if self._store is None:
            return status
        if status:
            self._end(status)
        self._over.set()
        import jax

        jax.distributed.shutdown()
        return status

    def _next_point(self) -> int:
        with self._lock:
            self._point += 1
            return self._point

    def _stops(self, point: int) -> bool:
        return self._stop_at is not None and point >= self._stop_at

    def _get(self, key: str, while_stopping: bool = False) -> str:
        """Waits for a value of the store, however long it takes others to come to it."""
        assert self._store is not None
        while True:
            value = self._store.wait(key)
            if value is not None:
                return value
            self.check()
            if self._stop_requested.is_set() and not while_stopping:
                raise Stopped

    def _culprit(self) -> Failure | None:
        """The failure of another process, or its silence, as far as known within some seconds."""
        assert self._store is not None
        until = time.monotonic() + SILENT_SECONDS + 5 * POLL_SECONDS
        while time.monotonic() < until:
            known = _failure(self._store.get("failure"))
            if known is not None:
                return known
            if silent := self._store.all("silent/"):
                return Failure(
                    f"process {min(silent)} stopped answering: killed, or its machine is down; "
                    "continue with --resume",
                    1,
                )
            time.sleep(POLL_SECONDS)
        return None

    def _end(self, status: int) -> NoReturn:
        """Ends this process once all others are ending, or gone.

        Not before: its connections close with it, and gloo aborts (SIGABRT, and not a line of ours)
        a process whose peer leaves in the middle of a collective.
        """
        assert self._store is not None
        with contextlib.suppress(RuntimeError):  # the store went with process 0
            self._store.set(f"left/{self.index}", "")
            until = time.monotonic() + LINGER_SECONDS
            while time.monotonic() < until:
                gone = self._store.all("left/").keys() | self._store.all("silent/").keys()
                if len(gone) >= self.count:
                    break
                time.sleep(POLL_SECONDS / 4)
            if self.main:  # it holds the store, in which the others have yet to read this
                time.sleep(POLL_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def _watch(self) -> None:
        """The watching thread: signs of life, failures of others, requests to stop."""
        while not self._over.wait(POLL_SECONDS):
            try:
                self._show_and_see()
                self._agree_where_to_stop()
            except RuntimeError:  # the store went with process 0; jax ends this process
                continue

    def _show_and_see(self) -> None:
        assert self._store is not None
        self._store.set(f"alive/{self.index}", str(time.monotonic()))
        if self.main:
            self._silence.listen(self._store.all("alive/"))
            for index in self._silence.newly_silent():
                self._store.set(f"silent/{index}", "")
                _say(
                    f"process {index} has not answered for {SILENT_SECONDS:.0f} s: killed, or its "
                    "machine is down"
                )
        if self._failure is None:
            self._failure = _failure(self._store.get("failure"))
        if self._failure is None or self._failure.process == self.index:
            return
        self._failure_seen = self._failure_seen or time.monotonic()
        if time.monotonic() - self._failure_seen > GRACE_SECONDS:
            _say(self._failure.line)
            self._end(self._failure.status)

    def _agree_where_to_stop(self) -> None:
        """Fixes the point at which all stop, beyond the last that any of them has passed.

        No process passes another point between telling where it is and knowing where to stop.
        """
        assert self._store is not None
        if self._stop_at is not None:
            return
        if self._stop_requested.is_set():
            self._store.set("stop/asked", "")
        elif self._store.get("stop/asked") is None:
            return
        with self._lock:
            self._store.set(f"stop/at/{self.index}", str(self._point))
            while len(points := self._store.all("stop/at/")) < self.count:
                if self._over.wait(POLL_SECONDS / 10):
                    return
                self._show_and_see()
            self._stop_at = 1 + max(map(int, points.values()))


class Silence:
    """Which processes show no signs of life, by when their sign last changed."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[str, float]] = {}
        self._named: set[str] = set()

    def listen(self, signs: dict[str, str]) -> None:
        for index, sign in signs.items():
            if self._last.get(index, ("", 0.0))[0] != sign:
                self._last[index] = (sign, time.monotonic())
                self._named.discard(index)

    def silent(self) -> set[str]:
        now = time.monotonic()
        return {i for i, (_, heard) in self._last.items() if now - heard > SILENT_SECONDS}

    def newly_silent(self) -> set[str]:
        new = self.silent() - self._named
        self._named |= new
        return new


class Store:
    """The key-value store of jax's coordination service. jax has no public handle on it."""

    def __init__(self) -> None:
        from jax._src import distributed

        client = distributed.global_state.client
        assert client is not None
        self._client: Any = client

    def set(self, key: str, value: str) -> None:
        self._client.key_value_set(f"dpo4rec/{key}", value, allow_overwrite=True)

    def set_once(self, key: str, value: str) -> None:
        """Sets a key unless it is set."""
        try:
            self._client.key_value_set(f"dpo4rec/{key}", value)
        except RuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise

    def get(self, key: str) -> str | None:
        try:
            return self._client.key_value_try_get(f"dpo4rec/{key}")
        except RuntimeError as error:
            if "NOT_FOUND" not in str(error):
                raise
            return None

    def wait(self, key: str) -> str | None:
        """The value, or None if there is none within a second."""
        try:
            return self._client.blocking_key_value_get(f"dpo4rec/{key}", 1000)
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            return None

    def all(self, prefix: str) -> dict[str, str]:
        """The values below a prefix by the last part of their keys."""
        found = self._client.key_value_dir_get(f"dpo4rec/{prefix}")
        return {key.rpartition("/")[2]: value for key, value in found}


def _failure(text: str | None) -> Failure | None:
    return None if text is None else Failure(**json.loads(text))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


_this = Processes()


def this() -> Processes:
    """The processes as this one sees them; alone until `launch.start` has met the others."""
    return _this


def join(processes: Processes) -> Processes:
    global _this
    _this = processes
    return processes
