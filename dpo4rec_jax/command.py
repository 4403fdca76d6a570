"""What every command promises: one line for a user's mistake, and the exit status."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from dpo4rec_jax.config import InputError
from dpo4rec_jax.runtime.processes import Failed, Failure, Stopped, this

MAKE_ROOM = "; make room and continue with --resume"
MAKE_WRITABLE = "; give write permission and continue with --resume"
WHAT_TO_DO = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), MAKE_ROOM),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), MAKE_WRITABLE),
}

NO_ROOM = os.strerror(errno.ENOSPC)

DONE, OURS, USERS, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143

TRANSPARENT_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MALLOC_SETTINGS = "GLIBC_TUNABLES"  # read by glibc once, before a process runs


def use_huge_pages() -> None:
    """Starts this very process anew with malloc asking for huge pages, where programs must ask.

    XLA takes its buffers on a CPU from malloc anew at each call of a program. In pages of 4 KiB, a
    step of DPO spends a tenth of its time on page faults. Who sets GLIBC_TUNABLES decides himself.
    """
    try:
        for_the_asking = "[madvise]" in TRANSPARENT_HUGE_PAGES.read_text()
    except OSError:  # not Linux, or not told
        return
    if for_the_asking and MALLOC_SETTINGS not in os.environ:
        os.environ[MALLOC_SETTINGS] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, sys.orig_argv)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """--config and --set, as every command that takes a config has them."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="C",
        help="YAML file, see configs/; every key is in docs/configuration.md",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        help="override a key of the config, e.g. --set rank.backbone=dlcm; may be repeated",
    )


def exit_status(body: Callable[[], None]) -> int:
    """Runs a command's body: 0 done, 2 the user's mistake, 1 ours, 130/143 stopped by a signal.

    Of several processes, all end with the line and the status of the one that failed first.
    """
    try:
        body()
    except Failed as other:
        failure = other.failure
    except (Exception, Stopped, KeyboardInterrupt) as error:
        own = _failure(error)
        if own.status == OURS:
            traceback.print_exc()
        failure = this().first(own, may_be_an_echo=isinstance(error, RuntimeError))
        if failure.line == own.line and own.status == OURS:
            return this().leave(OURS)  # the traceback has said it
    else:
        return this().leave(DONE)
    print(failure.line, file=sys.stderr)
    return this().leave(failure.status)


def _failure(error: BaseException) -> Failure:
    """The line that a person reads, and the exit status."""
    if isinstance(error, InputError):
        return Failure(f"error: {error}", USERS)
    if isinstance(error, Stopped):
        return Failure("stopped by SIGTERM; continue with --resume", TERMINATED)
    if isinstance(error, KeyboardInterrupt):
        return Failure("interrupted; continue with --resume", INTERRUPTED)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        what = WHAT_TO_DO.get(error.errno or 0, "")
        return Failure(f"error: {where}{error.strerror or error}{what}", USERS)
    reason = (str(error).strip().splitlines() or [""])[0]
    if NO_ROOM in reason:  # of libraries with errors of their own
        return Failure(f"error: {reason}{MAKE_ROOM}", USERS)
    return Failure(
        f"process {this().index} failed: {type(error).__name__}: {reason}; its own output has the "
        "traceback",
        OURS,
    )
