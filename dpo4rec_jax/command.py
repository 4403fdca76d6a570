"""What every command promises: one line for a user's mistake, and the exit status."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable

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

MALLOC = "GLIBC_TUNABLES"  # read by glibc once, before a process runs
OUR_MALLOC = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {
        "hugetlb": 1,  # huge pages, where Linux leaves them to programs
        "mmap_threshold": 4 * 2**30,  # what is smaller goes back to malloc when freed,
        "trim_threshold": 8 * 2**30,  # and from there to Linux when so much is free
    }.items()
)


def settle_malloc() -> None:
    """Starts this very process anew with malloc set so that what is freed is used again.

    XLA takes its buffers on a CPU from malloc anew at each call of a program, and malloc takes
    large ones from Linux, which hands them out in pages of 4 KiB, each at its first touch: a tenth
    of a DPO step. Who sets GLIBC_TUNABLES decides himself.
    """
    if sys.platform == "linux" and MALLOC not in os.environ:
        os.environ[MALLOC] = OUR_MALLOC
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
