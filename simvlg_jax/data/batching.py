"""From examples to batches: padding, grouping by length, and the rows of one process. `batch` describes the layout."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import grain
import numpy as np

from simvlg_jax.data.batch import Batch, BatchSpec
from simvlg_jax.data.skipped import Skip
from simvlg_jax.data.text import IGNORE, TextEncoder


class Example(NamedTuple):
    """One example of a batch.

    Attributes:
      image: uint8 (S, S, 3); None in tasks without pictures.
      texts: name -> (ids, targets), equally long.
      weight: 1, or 0 for a blank example.
      skip: the record in whose place a blank example stands.
      read_seconds, decode_seconds: of reading the record, and of making the example of it.
    """

    image: np.ndarray | None
    texts: dict[str, tuple[list[int], list[int]]]
    weight: float = 1.0
    skip: Skip | None = None
    read_seconds: float = 0.0
    decode_seconds: float = 0.0


class Report:
    """What happened while the examples of one batch were made. It travels with the batch as "report".

    Attributes:
      examples: their number.
      skips: the records that could not be used.
      read_seconds, decode_seconds: sums over the examples.
      made: when the batch was whole, in seconds of `time.monotonic`.
    """

    def __init__(self, examples: Sequence[Example]):
        self.examples = len(examples)
        self.skips = [example.skip for example in examples if example.skip]
        self.read_seconds = sum(example.read_seconds for example in examples)
        self.decode_seconds = sum(example.decode_seconds for example in examples)
        self.made = time.monotonic()


def collate(examples: Sequence[Example], *, spec: BatchSpec, multiple: int) -> Batch:
    """One batch of the examples, with a `Report` as "report" besides the arrays of the layout.

    Args:
      multiple: the main text is padded to the longest example, rounded up to a multiple of this; 0: to its max_tokens.
        The other texts are always padded to theirs.
    """
    weight = np.array([example.weight for example in examples], np.float32)
    batch = {"weight": weight}
    if spec.pictures:
        batch["image"] = np.stack([example.image for example in examples])
    for name, text in spec.texts.items():
        ids, targets = zip(*(example.texts[name] for example in examples), strict=True)
        length = text.max_tokens
        if multiple and name == spec.main_text:
            length = min(length, -(-max(map(len, ids)) // multiple) * multiple)
        batch[f"{name}_ids"] = pad(ids, length, text.encoder.pad_id)
        batch[f"{name}_mask"] = pad([[1] * len(row) for row in ids], length, 0)
        if text.predicted:
            batch[f"{name}_targets"] = pad(targets, length, IGNORE)
    return batch | {"report": Report(examples)}


def pad(rows: Sequence[list[int]], length: int, value: int, left: bool = False) -> np.ndarray:
    """Lists of at most `length` ids -> int32 (len(rows), length), filled up with `value` on the right or the left."""
    padded = np.full((len(rows), length), value, np.int32)
    for row, ids in zip(padded, rows, strict=True):
        start = length - len(ids) if left else 0
        row[start : start + len(ids)] = ids
    return padded


def pad_prompts(encoder: TextEncoder, prompts: Sequence[str], multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids of prompts, without the start token, and their mask: int32 (B, Q), padded on the left.

    Args:
      multiple: they are padded to the longest, rounded up to a multiple of this; 0: to the longest possible.
    """
    ids = [encoder.prompt_ids(prompt)[1:] for prompt in prompts]
    length = encoder.max_tokens - 1
    if multiple:
        length = min(length, -(-max(map(len, ids)) // multiple) * multiple)
    mask = pad([[1] * len(row) for row in ids], length, 0, left=True)
    return pad(ids, length, encoder.pad_id, left=True), mask


class RowsOf(grain.MapDataset):
    """The given rows of each group of `size` consecutive examples of an endless dataset."""

    def __init__(self, parent: grain.MapDataset, rows: Sequence[int], size: int):
        super().__init__(parent)
        self._rows, self._size = rows, size

    def __len__(self) -> int:
        return len(self._parent) // self._size * len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, len(self._rows))
        return self._parent[batch * self._size + self._rows[row]]


@dataclass(frozen=True)
class LengthGroups:
    """Splits a window of examples into batches of similar text length, in random order.

    The language model computes padding like any other token; batches of similar length hold little of it.

    Attributes:
      text: name of the text whose length counts.
    """

    batch_size: int
    text: str
    collate: Callable[[Sequence[Example]], Batch]

    def __call__(self, examples: list[Example], rng: np.random.Generator) -> list[Batch]:
        starts = np.arange(0, len(examples), self.batch_size)
        if len(starts) > 1:
            examples = sorted(examples, key=lambda example: len(example.texts[self.text][0]))
            rng.shuffle(starts)
        return [self.collate(examples[start : start + self.batch_size]) for start in starts]


@dataclass
class Each(grain.experimental.FlatMapTransform):
    """Flattens lists of batches."""

    max_fan_out: int

    def flat_map(self, batches: list[Batch]) -> list[Batch]:
        return batches
