"""Measures loss, speed and memory between two lines of the training log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np

from simvlg_jax.data.skipped import REASONS, Skipped
from simvlg_jax.data.timings import Taken, Timings
from simvlg_jax.parallel import collectives
from simvlg_jax.training.metrics_log import memory_gb
from simvlg_jax.utils.errors import UserError

LAST = ("grad_norm", "lr")


class Meter:
    """Counts steps, pictures, FLOPs and seconds since the last line."""

    def __init__(self):
        self._metrics: list[tuple[int, dict[str, jax.Array]]] = []
        self._clear()

    def _clear(self) -> None:
        self._metrics.clear()
        self._start, self._waited, self._images, self._flops = time.monotonic(), 0.0, 0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time within the context as waiting for data."""
        before = time.monotonic()
        yield
        self._waited += time.monotonic() - before

    def pause(self, seconds: float) -> None:
        """Excludes time that was spent on other work, such as an evaluation."""
        self._start += seconds

    def add(self, step: int, metrics: dict[str, jax.Array], images: int, flops: int) -> None:
        """Counts one step, without waiting for its metrics."""
        self._metrics.append((step, metrics))
        self._images += images
        self._flops += flops

    def check_finite(self) -> None:
        """Raises UserError with the steps whose loss is not finite."""
        values = jax.device_get([metrics["loss"] for _, metrics in self._metrics])
        bad = [step for (step, _), value in zip(self._metrics, values, strict=True) if not np.isfinite(value)]
        if bad:
            raise UserError(
                f"the loss is not finite at step {', '.join(map(str, bad[:5]))}: nothing after the last checkpoint is "
                "saved. Lower optimizer.lr, set optimizer.clip_norm=1, or use dtype float32, in a new workdir"
            )

    def read(self, skipped: Skipped, timings: Timings) -> dict[str, float]:
        """Returns the values of a log line and resets the counts. Every process calls it at the same step.

        Metrics are means over the steps since the last line, and those of LAST are of the last step.

        Args:
          skipped: the records that this process skipped so far.
          timings: of the batches that it received since the last line.
        """
        self.check_finite()
        seconds = time.monotonic() - self._start
        steps = jax.device_get([metrics for _, metrics in self._metrics])
        values = {name: float(np.mean([each[name] for each in steps])) for name in steps[-1]}
        values |= {name: float(steps[-1][name]) for name in LAST}
        values["images_per_second"] = self._images / seconds
        values["tflops"] = self._flops / seconds / 1e12
        # Of the slowest and the fullest process, since these limit the run.
        counts = [skipped.counts[reason] for reason in REASONS]
        taken = timings.take()
        depth = taken.ready / taken.draws if taken.draws else 0.0
        numbers = collectives.numbers_of_all(self._waited / seconds, memory_gb(), depth, *taken, *counts)
        values["data_wait"], values["memory_gb"] = map(float, numbers[:, :2].max(0))
        sums = numbers[:, 3:].sum(0).tolist()
        taken, counts = Taken(*sums[: len(taken)]), sums[len(taken) :]
        if taken.draws:
            values["queue_depth"] = float(numbers[:, 2].min())
        if taken.examples:
            values["read_ms"] = 1000 * taken.read / taken.examples
            values["decode_ms"] = 1000 * taken.decode / taken.examples
        if taken.cut:
            values["captions_cut"] = taken.cut
        values |= {f"skipped/{reason}": count for reason, count in zip(REASONS, counts, strict=True) if count}
        if total := sum(counts):
            values["unreadable"] = total
        self._clear()
        return values
