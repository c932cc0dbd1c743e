"""When a run stops early: on SIGINT, SIGTERM, a maintenance notice or a time limit, on all processes at once."""

import os
import signal
import time

import jax
from jax.experimental import multihost_utils

from simvlg_jax.parallel import collectives

OUT_OF_TIME = 1  # what a process knows of the reason for a stop; a signal's number is greater


class Stop:
    """Asked before each step whether to stop; a context within which signals wait until it is asked.

    With one process, SIGINT and SIGTERM are remembered; a second SIGINT acts as usual. With several, JAX's preemption
    service hears SIGTERM on any of them and makes all stop before the same step; SIGINT and the time limit of process 0
    go the same way. A machine that goes down, or a TPU's maintenance notice, says SIGTERM, and may say it repeatedly.

    Args:
      max_minutes: time limit from the first `reached` on, or 0.
    """

    def __init__(self, max_minutes: float):
        self._seconds = 60 * max_minutes or float("inf")
        self._started: float | None = None
        self._known = 0  # OUT_OF_TIME or a signal's number

    def __enter__(self) -> "Stop":
        # SIGTERM is the preemption service's where there is one.
        numbers = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else (signal.SIGINT,)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        self._known = number
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def grant(self, seconds: float) -> None:
        """Moves the time limit: evaluating is not training."""
        self._seconds += seconds

    def reached(self, step: int) -> bool:
        """Whether to stop instead of taking step `step` + 1; every process asks for each step once."""
        if self._started is None:
            self._started = time.monotonic()
        late = time.monotonic() - self._started > self._seconds and not self._known
        if jax.process_count() == 1:
            self._known = OUT_OF_TIME if late else self._known
            return self._known > 0
        if late and jax.process_index() == 0:
            self._known = OUT_OF_TIME
            os.kill(os.getpid(), signal.SIGTERM)
        return multihost_utils.reached_preemption_sync_point(step)

    def reason(self) -> signal.Signals | None:
        """The signal that stopped the run, or None if its time was out; the same on every process."""
        known = int(collectives.numbers_of_all(self._known).max())
        return None if known == OUT_OF_TIME else signal.Signals(known or signal.SIGTERM)
