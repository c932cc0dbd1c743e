"""Stops a run early on SIGINT, SIGTERM, a maintenance notice or a time limit, on all processes at the same step."""

import os
import signal
import time

import jax
from jax.experimental import multihost_utils

from simvlg_jax.parallel import collectives

OUT_OF_TIME = 1  # a reason to stop, like the signal numbers, which are greater


class Stop:
    """A context that defers signals until the next step. The loop calls `reached` before each step.

    With one process, SIGINT and SIGTERM are recorded; a second SIGINT has its usual effect. With several processes,
    JAX's preemption service receives SIGTERM on any of them and stops all before the same step. A process that receives
    SIGINT, or process 0 after its time limit, sends itself SIGTERM for that purpose. A machine that shuts down or a TPU
    maintenance notice sends SIGTERM, possibly several times.

    Args:
      max_minutes: time limit in minutes, counted from the first call of `reached`; 0: none.
    """

    def __init__(self, max_minutes: float):
        self._seconds = 60 * max_minutes or float("inf")
        self._started: float | None = None
        self._reason = 0  # 0, OUT_OF_TIME or a signal number

    def __enter__(self) -> "Stop":
        # With several processes, the preemption service handles SIGTERM.
        numbers = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else (signal.SIGINT,)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        self._reason = number
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def grant(self, seconds: float) -> None:
        """Extends the time limit, for time that is not spent on training, such as an evaluation."""
        self._seconds += seconds

    def reached(self, step: int) -> bool:
        """Returns whether to stop instead of taking step `step` + 1. Every process calls it once for each step."""
        if self._started is None:
            self._started = time.monotonic()
        late = time.monotonic() - self._started > self._seconds and not self._reason
        if jax.process_count() == 1:
            self._reason = OUT_OF_TIME if late else self._reason
            return self._reason > 0
        if late and jax.process_index() == 0:
            self._reason = OUT_OF_TIME
            os.kill(os.getpid(), signal.SIGTERM)
        return multihost_utils.reached_preemption_sync_point(step)

    def reason(self) -> signal.Signals | None:
        """Returns the signal that stopped the run, or None after the time limit; the same on every process."""
        reason = int(collectives.numbers_of_all(self._reason).max())
        return None if reason == OUT_OF_TIME else signal.Signals(reason or signal.SIGTERM)
