"""Errors meant for the person at the keyboard."""

import sys
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


def run_verb(main: Callable[[], int | None]) -> None:
    """Runs a command-line verb and turns what it raises into an exit status."""
    logging.set_verbosity(logging.ERROR)  # Orbax and TFDS speak of their own affairs
    try:
        status = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = error.status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        status = 1
    except OSError as error:
        if error.errno != 28:  # ENOSPC
            raise
        print(
            f"error: no space left on device ({error.filename or 'disk full'}): free some and run again",
            file=sys.stderr,
        )
        status = 1
    sys.stdout.flush()
    sys.exit(status)
