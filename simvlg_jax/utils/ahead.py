"""Runs a function ahead of the loop that takes its results, in a few threads and with bounded memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item, Made = TypeVar("Item"), TypeVar("Made")


def map_ahead(function: Callable[[Item], Made], items: Iterable[Item], threads: int, ahead: int) -> Iterator[Made]:
    """Yields `function` of each item, in order. At most `ahead` results wait to be taken.

    An error of the function is raised where its result would be yielded.
    """
    pool, waiting = ThreadPoolExecutor(threads), deque()
    try:
        for item in items:
            if len(waiting) == ahead:
                yield waiting.popleft().result()
            waiting.append(pool.submit(function, item))
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
