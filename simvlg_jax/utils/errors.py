"""Errors that are shown to the user, and the exit status of a command."""

import errno
import sys
import traceback
from collections.abc import Callable

from absl import logging

UNEXPECTED, TRY_AGAIN = 70, 75  # sysexits.h calls them EX_SOFTWARE and EX_TEMPFAIL
NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}


class UserError(Exception):
    """An error that the user can fix. The message states the problem and the fix.

    The command line prints it without a traceback and exits with `status` (1: failed, retrying will not help;
    2: invalid arguments or config; TRY_AGAIN: another process is missing, or has not released the workdir yet).
    """

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


def run_verb(main: Callable[[], int | None], before_failing: Callable[[str, int], None] | None = None) -> None:
    """Runs a command-line verb and exits with a status that depends on the exception it raises.

    UserError: its `status`. Full disk: 1. SIGINT: 130. Any other exception: UNEXPECTED, after its traceback.

    Args:
      before_failing: called with the reason and the exit status before the process exits with an error.
    """
    logging.set_verbosity(logging.FATAL)  # Orbax and TFDS log a lot, and they also raise the errors that they log
    try:
        status = main() or 0
    except (Exception, KeyboardInterrupt) as error:
        reason, status = _explain(error)
        if not isinstance(error, BrokenPipeError):
            print(reason if status == 130 else f"error: {reason}", file=sys.stderr, flush=True)
        if before_failing is not None:
            before_failing(reason, status)
    sys.stdout.flush()
    sys.exit(status)


def warn(message: str) -> None:
    """Prints "warning: MESSAGE" on standard error."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """Returns "Type: first line of the message", without the notes that libraries append."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def _explain(error: BaseException) -> tuple[str, int]:
    """Returns a one-line reason and the exit status; prints the traceback of unexpected errors."""
    if isinstance(error, UserError):
        return str(error), error.status
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, BrokenPipeError):
        return "standard output is closed", 1
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on device ({error.filename or 'disk full'}): free some and run again", 1
    if isinstance(error, OSError) and error.errno in NOT_WRITABLE and error.filename:
        return f"cannot use {error.filename}: {error.strerror}", 1
    traceback.print_exception(error)
    return first_line(error), UNEXPECTED
