"""What happens to a training batch when it reaches this process: its report is taken off and counted."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import grain

from simvlg_jax.data.batch import Batch
from simvlg_jax.data.mixture import Part
from simvlg_jax.data.skipped import Skip, Skipped
from simvlg_jax.data.sources import name_of
from simvlg_jax.data.timings import Timings


@dataclass(frozen=True)
class Receive:
    """Takes the report off each batch that reaches this process, counts it, and stops if too much is skipped.

    Attributes:
      max_share: `data.max_skipped`.
      enough: number of examples after which the share is checked.
    """

    parts: Sequence[Part]
    skipped: Skipped
    timings: Timings
    max_share: float
    enough: int

    def __call__(self, batch: Batch, asked: float) -> Batch:
        report = batch.pop("report")
        self.timings.draw(asked, report.made)
        self.timings.add(report.examples, report.read_seconds, report.decode_seconds, report.cut)
        self.skipped.add(report.skips, report.examples, self._name)
        self.skipped.check(self.max_share, self.enough)
        return batch if report.references is None else batch | {"references": report.references}

    def _name(self, skip: Skip) -> str:
        source = next(part.source for part in self.parts if part.name == skip.part)
        number = f"record {skip.record}" + (f" of {skip.part}" if skip.part else "")
        name = name_of(source, skip.record)
        return number if name is None else f"{number}, {name!r}"


class Received(grain.IterDataset):
    """The batches of a dataset after `Receive`, which also learns when each was asked for."""

    def __init__(self, parent: grain.IterDataset, receive: Receive):
        super().__init__(parent)
        self._receive = receive

    def __iter__(self) -> grain.DatasetIterator:
        return _Iterator(iter(self._parent), self._receive)


class _Iterator(grain.DatasetIterator):
    """Its position is that of the dataset before it."""

    def __init__(self, parent: grain.DatasetIterator, receive: Receive):
        super().__init__(parent)
        self._receive = receive

    def __next__(self) -> Batch:
        asked = time.monotonic()
        return self._receive(next(self._parent), asked)

    def get_state(self) -> dict:
        return self._parent.get_state()

    def set_state(self, state: dict) -> None:
        self._parent.set_state(state)
