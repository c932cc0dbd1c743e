"""Data worker processes: they leave signals to the process that trains, and end when it ends."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C reaches all processes of a terminal, SIGTERM all of a job


def start_worker(index: int, count: int) -> None:
    """Prepares a worker process before it reads data; the function that Grain calls with its number and their count.

    The worker ignores SIGINT and SIGTERM: the parent saves first and then stops its workers. It ends when its parent
    has ended, however that happened.
    """
    del index, count
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def start_tracker() -> None:
    """Starts multiprocessing's tracker of shared memory, if it is not up.

    It unblocks the signals in the thread that starts it, so it must be up before `signals_blocked`.
    """
    resource_tracker.ensure_running()


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Blocks SIGINT and SIGTERM in this thread; processes and threads that are started meanwhile inherit the block.

    A new worker takes seconds to reach `start_worker`, and a signal would kill it before. This process still receives
    the signal, in another thread or at the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
