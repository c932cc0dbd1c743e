"""From a source to endless training examples. A record that cannot be used becomes a blank example of weight 0."""

import time
from dataclasses import dataclass
from typing import NamedTuple

import grain
import ml_collections
import numpy as np

from simvlg_jax.data import transforms
from simvlg_jax.data.batch import BatchSpec
from simvlg_jax.data.batching import Example
from simvlg_jax.data.shuffling import shuffled
from simvlg_jax.data.skipped import Skip, reason
from simvlg_jax.data.sources import Record, Source
from simvlg_jax.data.text import IGNORE
from simvlg_jax.data.views import View, view_of
from simvlg_jax.utils.errors import first_line


class Read(NamedTuple):
    """What reading one record gave.

    Attributes:
      number: of the record in its source.
      record: None if it cannot be read.
      error: why not.
      seconds: that reading took.
    """

    number: int
    record: Record | None
    error: Exception | None
    seconds: float


@dataclass(frozen=True)
class Reader:
    """Reads the records of a source, and returns the error of one that cannot be read."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Read:
        start, record, failure = time.perf_counter(), None, None
        try:
            record = self.source[index]
        except transforms.UNREADABLE as error:
            failure = error
        return Read(int(index), record, failure, time.perf_counter() - start)


@dataclass(frozen=True)
class Augment:
    """Read -> training example: a random view of the picture, and the encoded texts. Grain gives the rng.

    Attributes:
      part: the name of the source in a mixture.
    """

    spec: BatchSpec
    view: View | None
    part: str

    def __call__(self, read: Read, rng: np.random.Generator) -> Example:
        start = time.perf_counter()
        try:
            if read.error is not None:
                raise read.error
            # The view is drawn first, so that it is the same whatever the texts are.
            image = self.view and self.view.train(read.record, rng)
            texts = self.spec.encode(_draw_text(read.record, rng), read.record.get("prompt", ""))
            example = Example(image, texts, references=tuple(read.record["references"]))
        except transforms.UNREADABLE as error:
            example = blank(self.spec, Skip(reason(error), first_line(error), read.number, self.part))
        return example._replace(read_seconds=read.seconds, decode_seconds=time.perf_counter() - start)


def _draw_text(record: Record, rng: np.random.Generator) -> str:
    """The caption, or one of the record's choices: an answer is drawn by its count among the answers."""
    choices = record.get("choices", [record["caption"]])
    return choices[int(rng.integers(len(choices)))] if len(choices) > 1 else choices[0]


def blank(spec: BatchSpec, skip: Skip | None = None) -> Example:
    """An example that does not count: a black picture and empty texts without targets.

    Args:
      skip: the record in whose place it stands.
    """
    image = spec.pictures and np.zeros(spec.pictures.shape(1)[1:], np.uint8)
    return Example(image, untargeted(spec.encode("")), weight=0.0, skip=skip)


def untargeted(texts: dict[str, tuple[list[int], list[int]]]) -> dict[str, tuple[list[int], list[int]]]:
    """The same texts, name -> (ids, targets), without a loss."""
    return {name: (ids, [IGNORE] * len(ids)) for name, (ids, _) in texts.items()}


def examples(
    data_config: ml_collections.ConfigDict, source: Source, spec: BatchSpec, seed: int, part: str = ""
) -> grain.MapDataset:
    """Endless training examples of one source: each epoch is a new permutation with new random views.

    Args:
      data_config: reads crop_scale, flip, reduced_decode, and what `shuffled` reads.
      part: the name of the source in a mixture.
    """
    views = dict(scale=tuple(data_config.crop_scale), flip=data_config.flip, reduced=data_config.reduced_decode)
    view = view_of(spec.pictures, **views)
    augment_seed = int(np.random.SeedSequence([seed, 0]).generate_state(1)[0])  # independent of the order's
    dataset = shuffled(grain.MapDataset.source(Reader(source)), data_config, seed, getattr(source, "prefetch", None))
    return dataset.repeat().random_map(Augment(spec, view, part), seed=augment_seed)
