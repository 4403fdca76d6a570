"""What every command promises: one line for a user's mistake, and the exit status."""

from __future__ import annotations

import argparse
import errno
import sys
import traceback
from collections.abc import Callable

from dpo4rec_jax.config import InputError
from dpo4rec_jax.runtime.progress import Stopped

MAKE_ROOM = "; make room and continue with --resume"
MAKE_WRITABLE = "; give write permission and continue with --resume"
WHAT_TO_DO = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), MAKE_ROOM),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), MAKE_WRITABLE),
}

DONE, OURS, USERS, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


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
    """Runs a command's body: 0 done, 2 the user's mistake, 1 ours, 130/143 stopped by a signal."""
    try:
        body()
    except InputError as error:
        return _say(f"error: {error}", USERS)
    except Stopped:
        return _say("stopped by SIGTERM; continue with --resume", TERMINATED)
    except KeyboardInterrupt:
        return _say("interrupted; continue with --resume", INTERRUPTED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        what = WHAT_TO_DO.get(error.errno or 0, "")
        return _say(f"error: {where}{error.strerror or error}{what}", USERS)
    except Exception:
        traceback.print_exc()
        return OURS
    return DONE


def _say(line: str, status: int) -> int:
    print(line, file=sys.stderr)
    return status
