"""Logging of a job and how it ends: exit code 0, 2 with one clear line for the user's error, 1 for ours.

Does not format metrics; those go to the manifest and the telemetry.
"""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from app.config import USAGE_ERROR

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def configure(level: int = logging.INFO) -> None:
    """Log lines on stderr: time, level, module, message; of libraries, warnings only."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname).1s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("app").setLevel(level)


@contextmanager
def job() -> Iterator[None]:
    """Run a job's body: a ValueError, also one raised inside a Ray task, becomes one message and exit code 2."""
    configure()
    try:
        yield
    except Exception as error:
        cause = user_error(error)
        if cause is None:
            raise
        sys.stderr.write("".join(f"error: {line}\n" for line in str(cause).splitlines()))
        raise SystemExit(USAGE_ERROR) from None


def user_error(error: BaseException | None) -> Exception | None:
    """What the user can mend, at the root of an error that Ray wrapped on its way here; None if the fault is ours.

    That is a ValueError of this project, or a disk that is full or may not be written.
    """
    pending, seen = [error], set()
    while pending:
        error = pending.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        if type(error) is ValueError or (isinstance(error, OSError) and error.errno in _DISK):
            return error
        failures = getattr(error, "worker_failures", {})  # of Ray Train
        pending += [*failures.values(), error.__cause__, getattr(error, "cause", None)]
    return None
