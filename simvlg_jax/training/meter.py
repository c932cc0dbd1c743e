"""What is measured between two lines of the training log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np

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
        """Within it the run waits for data."""
        before = time.monotonic()
        yield
        self._waited += time.monotonic() - before

    def pause(self, seconds: float) -> None:
        """Leaves out time that was spent on something else, such as an evaluation."""
        self._start += seconds

    def add(self, step: int, loss: jax.Array, images: int, flops: int) -> None:
        """One step more; its loss is not waited for."""
        self._losses.append((step, loss))
        self._images += images
        self._flops += flops

    def check_finite(self) -> None:
        """Raises UserError naming the steps whose loss is not finite."""
        values = jax.device_get([loss for _, loss in self._losses])
        bad = [step for (step, _), value in zip(self._losses, values, strict=True) if not np.isfinite(value)]
        if bad:
            raise UserError(
                f"the loss is not finite at step {', '.join(map(str, bad[:5]))}: nothing after the last checkpoint is "
                "saved. Lower optimizer.lr, set optimizer.clip_norm=1, or use dtype float32, in a new workdir"
            )

    def read(self, metrics: dict[str, jax.Array], unreadable: int) -> dict[str, float]:
        """The line for the last step's metrics; starts anew. Every process calls it at the same step.

        Args:
          unreadable: pictures that this process has replaced so far.
        """
        self.check_finite()
        seconds = time.monotonic() - self._start
        values = {name: float(value) for name, value in metrics.items()}
        values["loss"] = float(np.mean(jax.device_get([loss for _, loss in self._losses])))
        values["images_per_second"] = self._images / seconds
        values["tflops"] = self._flops / seconds / 1e12
        # Of the process that waits longest and of the fullest: the others wait for them.
        everyones = collectives.numbers_of_all(self._waited / seconds, memory_gb(), unreadable)
        values["data_wait"], values["memory_gb"] = map(float, everyones[:, :2].max(0))
        if replaced := float(everyones[:, 2].sum()):
            values["unreadable"] = replaced
        self._clear()
        return values
