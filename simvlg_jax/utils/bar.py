"""Shows how far a command is: a bar with rate and remaining time on a terminal, plain lines elsewhere."""

import sys
import time

from tqdm import tqdm

LINE_SECONDS = 10.0


class Progress:
    """Progress of some work, on standard error.

    Args:
      what: is done, "preparing".
      total: weight of all work.
      done: weight of what an earlier run finished.
      unit: of the weight, "records" or "bytes".
      items: what is counted beside the weight, for the rate.
      shown: False to print nothing.
    """

    def __init__(self, what: str, total: int, done: int, unit: str, items: str = "records", shown: bool = True):
        self._what, self._items, self._shown = what, items, shown
        self._both = unit != items  # the bar itself shows the rate of the weight
        self._total, self._first, self._weight = max(total, 1), done, done
        self._start = self._said = time.monotonic()
        self._bar = None
        if shown and sys.stderr.isatty():
            scaled = unit == "bytes"
            self._bar = tqdm(
                total=self._total,
                initial=done,
                unit="B" if scaled else f" {unit}",
                unit_scale=scaled,
                unit_divisor=1024 if scaled else 1000,
                desc=what,
                dynamic_ncols=True,
            )

    def update(self, weight: int, count: int) -> None:
        """Shows the weight and the number of items that are done since this run began."""
        weight += self._first
        now = time.monotonic()
        if self._bar is not None:
            if self._both:
                rate = _rate(count / max(now - self._start, 1e-3))
                self._bar.set_postfix_str(f"{rate} {self._items}/s", refresh=False)
            self._bar.update(weight - self._weight)
        elif self._shown and now - self._said >= LINE_SECONDS:
            self._said = now
            print(f"{self._what}: {self._line(weight, count, now - self._start)}", file=sys.stderr, flush=True)
        self._weight = weight

    def _line(self, weight: int, count: int, seconds: float) -> str:
        new = weight - self._first
        left = f", {(self._total - weight) * seconds / new / 60:.1f} min left" if new else ""
        return f"{100 * weight / self._total:.1f} %, {count:,} {self._items}, {_rate(count / seconds)}/s{left}"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _rate(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"
