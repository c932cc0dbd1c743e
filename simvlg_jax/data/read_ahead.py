"""Reads parts of files in one sweep before they are read at random, so that storage sees few large reads.

The bytes are dropped: what counts is that the system keeps them in its page cache. (Linux's own advice to do so,
POSIX_FADV_WILLNEED, covers only about a megabyte of what is asked for.)
"""

import contextlib
import functools
import queue
import threading

PIECE = 2**20  # bytes


def read_ahead(path: str, start: int, stop: int) -> None:
    """Has a thread of this process read bytes [start, stop) of a file, and returns at once.

    A file that cannot be read is left alone: whoever needs it meets the error.
    """
    _ranges().put((path, start, stop))


@functools.cache
def _ranges() -> queue.SimpleQueue:
    """Starts the thread, once in a process."""
    ranges = queue.SimpleQueue()
    threading.Thread(target=_sweep, args=(ranges,), daemon=True).start()
    return ranges


def _sweep(ranges: queue.SimpleQueue) -> None:
    buffer = memoryview(bytearray(PIECE))
    while True:
        path, start, stop = ranges.get()
        with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
            file.seek(start)
            while start < stop and (count := file.readinto(buffer[: stop - start])):
                start += count
