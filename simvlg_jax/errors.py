"""Errors meant for the person at the keyboard."""

import errno
import sys
import traceback
from collections.abc import Callable

from absl import logging


class UserError(Exception):
    """Something the user can fix: the message says what is wrong and what to do.

    The command line prints it without a traceback and exits with `status`
    (1: the work could not be done; 2: it was asked for wrongly).
    """

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


def run_verb(main: Callable[[], int | None], before_failing: Callable[[str, int], None] | None = None) -> None:
    """Runs a command-line verb and turns what it raises into an exit status.

    Args:
      before_failing: called with the reason and the exit status before the process ends with an error.
    """
    logging.set_verbosity(logging.ERROR)  # Orbax and TFDS speak of their own affairs
    reason = None
    try:
        status = main() or 0
    except UserError as error:
        reason, status = str(error), error.status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        status = 1
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            reason = f"no space left on device ({error.filename or 'disk full'}): free some and run again"
        else:
            traceback.print_exc()
            reason = traceback.format_exception_only(error)[-1].strip()
        status = 1
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr, flush=True)
        if before_failing is not None:
            before_failing(reason, status)
    sys.stdout.flush()
    sys.exit(status)
