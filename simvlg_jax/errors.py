"""Errors meant for the person at the keyboard."""

import errno
import sys
import traceback
from collections.abc import Callable

from absl import logging

UNEXPECTED, TRY_AGAIN = 70, 75  # sysexits.h calls them EX_SOFTWARE and EX_TEMPFAIL


class UserError(Exception):
    """Something the user can fix: the message says what is wrong and what to do.

    The command line prints it without a traceback and exits with `status` (1: the work could not be done, nor will it
    be if tried again; 2: it was asked for wrongly; TRY_AGAIN: another process is missing).
    """

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


def run_verb(main: Callable[[], int | None], before_failing: Callable[[str, int], None] | None = None) -> None:
    """Runs a command-line verb and turns what it raises into an exit status.

    A UserError gives its own; a full disk 1; SIGINT 130; anything else, with its traceback, UNEXPECTED.

    Args:
      before_failing: called with the reason and the exit status before the process ends with an error.
    """
    logging.set_verbosity(logging.ERROR)  # Orbax and TFDS speak of their own affairs
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


def _explain(error: BaseException) -> tuple[str, int]:
    """The reason in a line, and the exit status; of what nobody expected, the traceback is printed."""
    if isinstance(error, UserError):
        return str(error), error.status
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, BrokenPipeError):
        return "nobody reads its output any more", 1
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on device ({error.filename or 'disk full'}): free some and run again", 1
    traceback.print_exception(error)
    return traceback.format_exception_only(error)[-1].strip(), UNEXPECTED
