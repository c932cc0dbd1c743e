"""Common parts of the evaluators: the data of an evaluation, its result and its interface."""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simvlg_jax.data import pipeline, transforms
from simvlg_jax.data.skipped import REASONS, in_words
from simvlg_jax.data.sources import RecordInfo, Source, load_source, name_of
from simvlg_jax.evaluation.partial import Partial
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.tasks.task import Task
from simvlg_jax.utils.errors import UserError, warn
from simvlg_jax.utils.progress import Announcer


class Result(NamedTuple):
    """The result of an evaluation.

    Attributes:
      score: chooses the best checkpoint; higher is better. None if no record has anything to compare with.
      metrics: numbers for the log.
      details: returns the content of eval/NAME.json. It can be called on a single process.
      files: suffix, one of `submissions.SUFFIXES` -> JSON of another file, eval/NAME + suffix.
    """

    score: float | None
    metrics: dict[str, float]
    details: Callable[[], dict]
    files: Mapping[str, Sequence[dict]] = MappingProxyType({})


class Evaluator(Protocol):
    """Scores parameters. It is created once, so that it compiles once. All processes call it together.

    Attributes:
      name: of the entry of `config.evals`.
      every: steps between evaluations; 0: not during training.
      data: its examples.
    """

    name: str
    every: int
    data: "EvalData"

    def __call__(self, params: dict, announce: Announcer, partial: Partial | None = None) -> Result:
        """Args:
        partial: keeps what is finished. The verb `evaluate` gives it, and then details have pictures too.
        """


class EvalData:
    """The examples of one entry of `config.evals`.

    The constructor opens the source and reads one batch, so that errors in the data appear before the first step.

    Raises:
      UserError: the data set or the split does not exist or cannot be read.
    """

    def __init__(self, entry: ConfigDict, task: Task, config: ConfigDict, mesh: Mesh):
        data = config.data.copy_and_resolve_references()
        with data.unlocked():
            data.update(entry.data)
        source = load_source(data, entry.split)
        count = min(entry.max_examples or len(source), len(source))
        self.source: Source = Chosen(source, range(count)) if count < len(source) else source
        self._mesh = mesh
        shards = meshes.batch_shards(mesh)
        batch_size = -(-config.evaluate.batch_size // shards) * shards
        self.batch_size = batch_size
        self._make = functools.partial(
            pipeline.make_eval_batches,
            spec=task.batch,
            batch_size=batch_size,
            rows=meshes.local_rows(mesh, batch_size),
            pad_multiple=data.pad_multiple,
        )
        self._batches = self._make(self.source)
        next(iter(self._batches))

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        """Yields global batches on the devices. Each example occurs once."""
        return (batch for _, batch in self.batches())

    def batches(self, start: int = 0) -> Iterator[tuple[int, dict[str, jax.Array]]]:
        """Yields number and arrays of the batches, from number `start` on."""
        batches = self._make(self.source, start=start) if start else self._batches
        for number, batch in enumerate(batches, start):
            yield number, meshes.put_batch(batch, self._mesh)

    @property
    def has_references(self) -> bool:
        """Whether a record has captions or answers to compare with."""
        return any(info.references for info in self.infos())

    def infos(self) -> Iterator[RecordInfo]:
        """Yields what scores need of each record, but of those that cannot be read."""
        for index in range(len(self)):
            with contextlib.suppress(*transforms.UNREADABLE):
                yield self.source.info(index)

    def only(self, indices: Sequence[int]) -> Iterator[dict[str, jax.Array]]:
        """Yields global batches of some records. Their "index" is the place in `indices`."""
        return (meshes.put_batch(batch, self._mesh) for batch in self._make(Chosen(self.source, indices)))

    def report_unreadable(self, skipped: dict[int, int]) -> list[str]:
        """Warns about unreadable pictures, which the score excludes, and returns their ids.

        Args:
          skipped: index -> its value of the batch's "skipped".

        Raises:
          UserError: no picture can be read.
        """
        names = [self.name_of(index) for index in sorted(skipped)]
        reasons = in_words(Counter(REASONS[code - 1] for code in skipped.values()))
        first = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        if len(names) == len(self):
            raise UserError(
                f"none of the {len(self)} pictures can be read ({reasons}), so there is nothing to score: {first}"
            )
        if names and jax.process_index() == 0:
            counted = f"{len(names)} of {len(self)} pictures cannot be read"
            warn(f"{counted} and are left out of the score: {first} ({reasons})")
        return names

    def name_of(self, index: int) -> str:
        """Returns the id of a record, or its number if the id cannot be read either."""
        name = name_of(self.source, index)
        return f"record {index}" if name is None else name


class Chosen:
    """Some records of a source, in a given order."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict:
        return self._source[self._indices[index]]

    def info(self, index: int):
        return self._source.info(self._indices[index])


def unreadable_metric(names: list[str]) -> dict[str, float]:
    """Returns the number of unreadable pictures for the log, or {} if there are none."""
    return {"unreadable": float(len(names))} if names else {}
