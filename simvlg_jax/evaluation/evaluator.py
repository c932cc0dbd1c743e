"""Common parts of the evaluators: the data of an evaluation, its result and its interface."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simvlg_jax.data import pipeline
from simvlg_jax.data.skipped import REASONS, in_words
from simvlg_jax.data.sources import Source, load_source, name_of
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.tasks.task import Task
from simvlg_jax.utils.errors import UserError, warn
from simvlg_jax.utils.progress import Announcer


class Result(NamedTuple):
    """The result of an evaluation.

    Attributes:
      score: chooses the best checkpoint; higher is better.
      metrics: numbers for the log.
      details: returns the content of eval/NAME.json. It can be called on a single process.
    """

    score: float
    metrics: dict[str, float]
    details: Callable[[], dict]


class Evaluator(Protocol):
    """Scores parameters. It is created once, so that it compiles once. All processes call it together."""

    name: str
    every: int  # steps between evaluations; 0: not during training

    def __call__(self, params: dict, announce: Announcer) -> Result: ...


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
        self.source: Source = FirstOf(source, entry.max_examples) if entry.max_examples else source
        self._mesh = mesh
        shards = meshes.batch_shards(mesh)
        batch_size = -(-config.evaluate.batch_size // shards) * shards
        self._batches = pipeline.make_eval_batches(
            self.source,
            task.batch,
            batch_size=batch_size,
            rows=meshes.local_rows(mesh, batch_size),
            pad_multiple=data.pad_multiple,
        )
        next(iter(self._batches))

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        """Yields global batches on the devices. Each example occurs once."""
        return (meshes.put_batch(batch, self._mesh) for batch in self._batches)

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


class FirstOf:
    """The first `count` records of a source."""

    def __init__(self, source: Source, count: int):
        self._source, self._count = source, min(count, len(source))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict:
        return self._source[index]

    def info(self, index: int):
        return self._source.info(index)


def unreadable_metric(names: list[str]) -> dict[str, float]:
    """Returns the number of unreadable pictures for the log, or {} if there are none."""
    return {"unreadable": float(len(names))} if names else {}
