"""Does a run survive whatever happens to it: python tools/chaos.py --kills 15 --seed 0

A small complete run (`configs/quickstart.yaml`, shrunk) is taken once without trouble. Then, trial
after trial, it is started from just before a stage, something happens to it there, and it is
continued with `--resume`. In the end its report must be the undisturbed one, bit for bit but for
times, and so must every artifact; or a refusal must name the damaged file and the stage to rerun,
and doing what it says must lead there.

What happens: SIGKILL, SIGTERM or SIGINT at a random moment; SIGKILL at a random change to a file;
the newest file cut short; a full disk (a tmpfs, as root); write permission taken away; a second run
on the same workspace; clocks and modification times that are wrong.

Prints a line a trial and, last, one JSON line of counts. Exit status 1 where anything was lost.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from chaos_runs import (
    Ended,
    Lost,
    Reference,
    Runs,
    compare,
    finish,
    reached,
    snapshot,
    undisturbed,
)

from dpo4rec_jax.stages.plan import Step

# Dealt like cards: fifteen trials meet every kind.
DECK = (
    *("SIGKILL", "SIGKILL", "SIGKILL", "change", "change", "change", "SIGTERM", "SIGTERM"),
    *("SIGINT", "SIGINT", "cut", "full disk", "no permission", "second run", "wrong clock"),
)
SIGNALS = {"SIGKILL", "SIGTERM", "SIGINT"}
ENDS = {  # exit statuses that a signal may lead to; negative before the program can catch it
    "SIGKILL": (-signal.SIGKILL,),
    "SIGTERM": (143, -signal.SIGTERM),
    "SIGINT": (130, -signal.SIGINT, 1),  # 1: while Python itself starts
}
METRICS = Path("metrics.jsonl")
REFUSAL = re.compile(r"--stages (\S+) --overwrite")
CAPBSET_DROP, DAC_OVERRIDE = 24, 1  # prctl's option, and what lets root write where nobody may


class Trial:
    """One thing that happens in one step, and the way back."""

    def __init__(self, runs: Runs, reference: Reference, index: int, seed: int, number: int):
        self.runs, self.reference, self.number = runs, reference, number
        self.index, self.step = index, reference.steps[index]
        self.dice = random.Random(f"{seed} {number}")
        self.note = ""  # beside the kind of trouble
        self.cut_log: list[Step] = []  # steps whose lines in metrics.jsonl may be gone

    def take(self, kind: str, workdir: Path) -> str:
        """Returns how it ended: equal, or refused and then equal. Raises Lost."""
        if kind == "full disk":
            with small_disk(workdir) as grow:
                return self._full_disk(workdir, grow)
        snapshot(self.reference, self.index, workdir)
        if kind in SIGNALS:
            self.interrupt(kind, workdir)
        elif kind == "change":
            kill_at = self.dice.randint(1, self.reference.changes[self.index])
            ended = self.runs.whole(workdir, fault={"kill_at": kill_at})
            check_end(ended, "SIGKILL")
        elif kind == "cut":
            self.interrupt("SIGKILL", workdir)
            cut = cut_newest(workdir, self.dice)
            self.note = f" {cut}"
            self.cut_log = self.reference.steps[: self.index + 1] if cut == METRICS else []
        elif kind == "no permission":
            self._no_permission(workdir)
        elif kind == "second run":
            self._second_run(workdir)
        elif kind == "wrong clock":
            self.interrupt("SIGKILL", workdir)
            return self._wrong_clock(workdir)
        return self.come_back(workdir)

    def come_back(self, workdir: Path, **options: Any) -> str:
        """Continues as a person would: `--resume`, and what a refusal says, at most twice."""
        refusals = 0
        ended = self.runs.whole(workdir, "--resume", **options)
        while ended.status == 2 and refusals < 2 and (advice := REFUSAL.search(ended.line)):
            if str(workdir) not in ended.line:
                raise Lost(f"a refusal that names no file: {ended.line}")
            refusals += 1
            again = self.runs.whole(workdir, "--stages", advice[1], "--overwrite", **options)
            if again.status:
                raise Lost(f"what the refusal says fails ({again.status}): {again.line}")
            ended = self.runs.whole(workdir, "--resume", **options)
        if ended.status:
            raise Lost(f"--resume ends with status {ended.status}: {ended.line}")
        compare(self.reference, workdir, self.cut_log)
        return "refused, then equal" if refusals else "equal"

    def interrupt(self, kind: str, workdir: Path) -> None:
        process = self.runs.start(workdir)
        said = reached(process, self.step)
        time.sleep(self.dice.random() * self.reference.seconds[self.index])
        process.send_signal(signal.Signals[kind])
        check_end(finish(process, said), kind)

    def _full_disk(self, workdir: Path, grow: Any) -> str:
        shutil.rmtree(workdir / "w", ignore_errors=True)
        snapshot(self.reference, self.index, workdir / "w")
        used = bytes_below(workdir / "w")
        left = bytes_below(self.reference.workspace.path) - used
        grow(used + int(self.dice.random() * max(left, 2**16)))
        ended = self.runs.whole(workdir / "w")
        if ended.status:
            check_refusal(ended, "No space left on device")
        grow(used + 2**28)
        return self.come_back(workdir / "w")

    def _no_permission(self, workdir: Path) -> None:
        """Nothing may be written from the step's beginning on."""
        directories = [path for path in (workdir, *workdir.rglob("*")) if path.is_dir()]
        for path in directories:
            path.chmod(0o555)
        ended = self.runs.whole(workdir, preexec_fn=bound_by_permissions)
        for path in directories:
            path.chmod(0o755)
        check_refusal(ended, "Permission denied")

    def _second_run(self, workdir: Path) -> None:
        first = self.runs.start(workdir)
        said = reached(first, self.step)
        second = self.runs.whole(workdir, "--resume")
        check_refusal(second, f"in use by process {first.pid}")
        ended = finish(first, said)
        if ended.status:
            raise Lost(f"a second run broke the first: {ended.line}")

    def _wrong_clock(self, workdir: Path) -> str:
        """The years that files come from, and the hour it is, are made up."""
        for path in workdir.rglob("*"):
            moment = time.time() + self.dice.uniform(-3e8, 3e8)
            os.utime(path, (moment, moment))
        return self.come_back(workdir, fault={"clock": self.dice.uniform(-3e7, 3e7)})


def check_end(ended: Ended, kind: str) -> None:
    """A signal may come too late; else it ends the run as it should, and without a traceback."""
    if ended.status not in (0, *ENDS[kind]):
        raise Lost(f"{kind} ends with status {ended.status}: {ended.line}")
    if ended.status in (143, 130) and "Traceback" in ended.said:
        raise Lost(f"{kind}: a traceback: {ended.line}")


def check_refusal(ended: Ended, reason: str) -> None:
    if ended.status != 2 or reason not in ended.line or "Traceback" in ended.said:
        raise Lost(f"expected status 2 and {reason!r}, got {ended.status}: {ended.line}")


def cut_newest(workdir: Path, dice: random.Random) -> Path:
    """Returns which file it was, below the workspace."""
    files = [path for path in workdir.rglob("*") if path.is_file() and path.stat().st_size]
    newest = max(files, key=lambda path: (path.name != ".lock", path.stat().st_mtime_ns))
    os.truncate(newest, dice.randrange(newest.stat().st_size))
    return newest.relative_to(workdir)


def bytes_below(directory: Path) -> int:
    """Whole pages, as a tmpfs counts."""
    return sum(-(-path.stat().st_size // 4096) * 4096 + 4096 for path in directory.rglob("*"))


def bound_by_permissions() -> None:
    """Root writes where nobody may; a child of it without that capability does not."""
    import ctypes

    if os.geteuid() == 0:
        ctypes.CDLL(None).prctl(CAPBSET_DROP, DAC_OVERRIDE)


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[Any]:
    """A tmpfs at the directory, and a function that sets its size in bytes."""
    directory.mkdir(parents=True)
    mount("-t", "tmpfs", "-o", "size=256m", "tmpfs", str(directory))
    try:
        yield lambda size: mount("-o", f"remount,size={size}", str(directory))
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def can_mount(scratch: Path) -> bool:
    try:
        with small_disk(scratch / "disk"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def take(trial: Trial, kind: str, scratch: Path) -> tuple[str, str]:
    """How the trial ended, and a line about it; what a lost one left stays to be looked at."""
    workdir, began = scratch / f"trial{trial.number}", time.monotonic()
    try:
        outcome = trial.take(kind, workdir)
        shutil.rmtree(workdir)
        ended = outcome
    except Lost as loss:
        outcome, ended = "lost", f"lost: {loss}; see {workdir}"
    about = f"{kind}{trial.note} in {trial.step}"
    return outcome, f"{about}: {ended} ({time.monotonic() - began:.0f} s)"


def dealt(cards: list[Any], number: int, dice: random.Random) -> list[Any]:
    """So many cards from as many shuffled decks as that takes."""
    found: list[Any] = []
    while len(found) < number:
        found += dice.sample(cards, len(cards))
    return found[:number]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=15, metavar="N", help="trials")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of all that is drawn")
    parser.add_argument("--workers", type=int, default=1, metavar="W", help="trials at once")
    parser.add_argument("--kind", choices=sorted(set(DECK)), help="only trouble of this kind")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="compiled programs to start from")
    options = parser.parse_args()
    began, counts = time.monotonic(), collections.Counter()
    scratch = Path(tempfile.mkdtemp(prefix="chaos-"))
    runs = Runs(options.cache or scratch / "compiled")
    reference = undisturbed(runs, scratch)
    print(f"undisturbed, twice: {time.monotonic() - began:.0f} s", flush=True)
    dice = random.Random(options.seed)
    deck = list(DECK)
    if not can_mount(scratch):
        print("full disk: left out, it takes the right to mount a tmpfs")
        deck.remove("full disk")
    if options.kind:
        deck = [kind for kind in deck if kind == options.kind]
        if not deck:
            parser.error(f"--kind {options.kind}: cannot be had here")
    kinds = dealt(deck, options.kills, dice)
    places = dealt(list(range(len(reference.steps))), options.kills, dice)
    with ThreadPoolExecutor(options.workers) as pool:
        trials = enumerate(zip(kinds, places, strict=True), 1)
        takes = [
            pool.submit(take, Trial(runs, reference, index, options.seed, number), kind, scratch)
            for number, (kind, index) in trials
        ]
        for taken in as_completed(takes):
            outcome, line = taken.result()
            counts[outcome] += 1
            print(f"{sum(counts.values())}/{options.kills} {line}", flush=True)
    summary = {"kills": options.kills, "seed": options.seed, "kinds": collections.Counter(kinds)}
    summary |= {"equal": counts["equal"], "refused_then_equal": counts["refused, then equal"]}
    summary |= {"lost": counts["lost"], "seconds": round(time.monotonic() - began)}
    if not counts["lost"]:
        shutil.rmtree(scratch)
    print(json.dumps(summary))
    return 1 if counts["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
