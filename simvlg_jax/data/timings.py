"""How long examples take in the processes that make them, and how many batches are ready when the step asks for one."""

import collections
import math
from typing import NamedTuple


class Taken(NamedTuple):
    """Sums since the last line of the log.

    Attributes:
      read, decode: seconds over the examples.
      cut: number of texts that lost tokens because their pack had no room.
      draws: number of batches that were asked for.
      ready: over the draws, batches that were ready then, the drawn one included.
    """

    examples: int = 0
    read: float = 0.0
    decode: float = 0.0
    cut: int = 0
    draws: int = 0
    ready: int = 0


class Timings:
    """Sums what the reports of the batches say that this process received.

    A batch tells when it was made. So whether it was ready at an earlier draw is known when it arrives itself; the
    sums hold it from then on. This needs no shared counter and is the same for threads and for worker processes.
    """

    def __init__(self):
        self._sums = Taken()
        self._asked: collections.deque[float] = collections.deque()  # draws that later batches may have been ready at
        self._made = -math.inf

    def add(self, examples: int, read: float, decode: float, cut: int = 0) -> None:
        """Counts the seconds of reading and of decoding (with augmenting) of some examples, and the texts cut."""
        sums = self._sums
        self._sums = sums._replace(
            examples=sums.examples + examples, read=sums.read + read, decode=sums.decode + decode, cut=sums.cut + cut
        )

    def draw(self, asked: float, made: float) -> None:
        """Counts a batch.

        Args:
          asked, made: when the step asked for it, and when it was whole: seconds of `time.monotonic`, which all
            processes of a machine share.
        """
        self._made = max(self._made, made)  # batches come in order, so one that waits for another is not ready
        self._asked.append(asked)
        while self._asked and self._asked[0] < self._made:  # nor are later batches ready at these draws
            self._asked.popleft()
        self._sums = self._sums._replace(draws=self._sums.draws + 1, ready=self._sums.ready + len(self._asked))

    def take(self) -> Taken:
        """Returns the sums since the last call."""
        taken, self._sums = self._sums, Taken()
        return taken
