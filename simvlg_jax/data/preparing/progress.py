"""Shows how far preparing is: a bar on a terminal, lines elsewhere."""

import sys
import time

from tqdm import tqdm

LINE_SECONDS = 10.0


class Progress:
    """Progress of some shards.

    Args:
      total: weight of all shards.
      done: weight of those that an earlier run finished.
      unit: of the weight, "records" or "bytes".
    """

    def __init__(self, total: int, done: int, unit: str):
        self._total, self._first, self._weight, self._count = max(total, 1), done, done, 0
        self._start = self._said = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            scaled = unit == "bytes"
            self._bar = tqdm(
                total=self._total,
                initial=done,
                unit="B" if scaled else " records",
                unit_scale=scaled,
                unit_divisor=1024 if scaled else 1000,
                desc="preparing",
            )

    def update(self, weight: int, count: int) -> None:
        """Shows the weight that is done, and the number of records that this run has read."""
        weight += self._first
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(f"{count / max(now - self._start, 1e-3):.0f} records/s", refresh=False)
            self._bar.update(weight - self._weight)
        elif now - self._said >= LINE_SECONDS:
            self._said = now
            print(f"preparing: {self._line(weight, count, now - self._start)}", file=sys.stderr, flush=True)
        self._weight, self._count = weight, count

    def _line(self, weight: int, count: int, seconds: float) -> str:
        new = weight - self._first
        left = f", {(self._total - weight) * seconds / new / 60:.1f} min left" if new else ""
        return f"{100 * weight / self._total:.1f} %, {count:,} records, {count / seconds:.0f}/s{left}"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
