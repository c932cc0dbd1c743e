"""Data worker processes ignore signals, which the training process handles, and end when it ends.

If one is killed, the run ends with the reason.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

from simvlg_jax.utils.errors import UNEXPECTED, UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C is sent to all processes of a terminal, SIGTERM to all of a job


def start_worker(index: int, count: int) -> None:
    """Prepares a worker process before it reads data.

    The worker ignores SIGINT and SIGTERM, since the parent first saves and then stops its workers. It exits when the
    parent has ended for any reason.
    """
    del index, count  # Grain passes them
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def start_tracker() -> None:
    """Starts multiprocessing's tracker of shared memory unless it runs.

    Starting it unblocks the signals in the calling thread, so it must run before `signals_blocked`.
    """
    resource_tracker.ensure_running()


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Blocks SIGINT and SIGTERM in this thread, and in the processes and threads that start meanwhile.

    A new worker needs seconds to reach `start_worker`, and until then a signal would kill it. This process still
    receives the signal, in another thread or after the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def deaths_explained() -> Iterator[None]:
    """Raises UserError (status UNEXPECTED: a restart may help) where Grain finds that a worker was killed."""
    try:
        yield
    except RuntimeError as error:
        if "Worker process was terminated unexpectedly" not in str(error):
            raise
        code = str(error).partition("exit code ")[2].partition(".")[0]
        raise UserError(
            f"a data worker was killed (exit code {code}); if memory ran out, lower data.workers or data.read_threads. "
            "Run again to resume from the last checkpoint",
            UNEXPECTED,
        ) from error
