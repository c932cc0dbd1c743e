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


class Meter:
    """Counts steps, pictures, FLOPs and seconds since the last line."""

    def __init__(self):
        self._losses: list[tuple[int, jax.Array]] = []
        self._clear()

    def _clear(self) -> None:
        self._losses.clear()
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

    def add(self, step: int, loss: jax.Array, images: int, flops: int) -> None:
        """Counts one step, without waiting for its loss."""
        self._losses.append((step, loss))
        self._images += images
        self._flops += flops

    def check_finite(self) -> None:
        """Raises UserError with the steps whose loss is not finite."""
        values = jax.device_get([loss for _, loss in self._losses])
        bad = [step for (step, _), value in zip(self._losses, values, strict=True) if not np.isfinite(value)]
        if bad:
            raise UserError(
                f"the loss is not finite at step {', '.join(map(str, bad[:5]))}: nothing after the last checkpoint is "
                "saved. Lower optimizer.lr, set optimizer.clip_norm=1, or use dtype float32, in a new workdir"
            )

    def read(self, metrics: dict[str, jax.Array], skipped: Skipped, timings: Timings) -> dict[str, float]:
        """Returns the values of a log line and resets the counts. Every process calls it at the same step.

        Args:
          metrics: of the last step.
          skipped: the records that this process skipped so far.
          timings: of the batches that it received since the last line.
        """
        self.check_finite()
        seconds = time.monotonic() - self._start
        values = {name: float(value) for name, value in metrics.items()}
        values["loss"] = float(np.mean(jax.device_get([loss for _, loss in self._losses])))
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
