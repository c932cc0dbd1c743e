"""Messages before and after work that takes long."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator

LONG_SECONDS = 5.0


class Announcer:
    """Announces work that is done once, such as compiling.

    Args:
      say: prints a line.
    """

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._done: set[str] = set()
        self._seconds: dict[str, float] = {}  # kind of work -> how long it took last time

    @contextlib.contextmanager
    def first(self, work: str, detail: str = "") -> Iterator[None]:
        """Announces "WORK DETAIL" at its start and end, unless it was done before or is expected to be quick.

        It is expected to be quick if the last `work` with another detail took less than LONG_SECONDS.
        """
        name = f"{work} {detail}".strip()
        if name in self._done:
            yield
            return
        expected, start = self._seconds.get(work, math.inf), time.monotonic()
        if expected >= LONG_SECONDS:
            self._say(f"{name} ...")
        yield
        self._done.add(name)
        self._seconds[work] = taken = time.monotonic() - start
        if max(expected, taken) >= LONG_SECONDS:
            self._say(f"{name}: {taken:.1f} s")


SILENT = Announcer(lambda message: None)
