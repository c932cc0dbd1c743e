"""From examples to batches: padding or joining texts, and the rows of one process. `batch` describes the layout."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import grain
import numpy as np

from simvlg_jax.data.batch import Batch, BatchSpec, Pack
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
      references: all captions of the picture; none of a blank example.
    """

    image: np.ndarray | None
    texts: dict[str, tuple[list[int], list[int]]]
    weight: float = 1.0
    skip: Skip | None = None
    read_seconds: float = 0.0
    decode_seconds: float = 0.0
    references: tuple[str, ...] = ()


class Report:
    """What happened while the examples of one batch were made. It travels with the batch as "report".

    Attributes:
      examples: their number.
      skips: the records that could not be used.
      read_seconds, decode_seconds: sums over the examples.
      references: of each example, if the model writes the texts itself.
      cut: number of texts that lost tokens because their pack had no room.
      made: when the batch was whole, in seconds of `time.monotonic`.
    """

    def __init__(self, examples: Sequence[Example]):
        self.examples = len(examples)
        self.skips = [example.skip for example in examples if example.skip]
        self.read_seconds = sum(example.read_seconds for example in examples)
        self.decode_seconds = sum(example.decode_seconds for example in examples)
        self.references: list[tuple[str, ...]] | None = None
        self.cut = 0
        self.made = time.monotonic()


def collate(examples: Sequence[Example], *, spec: BatchSpec, multiple: int, pack: Pack | None = None) -> Batch:
    """One batch of the examples, with a `Report` as "report" besides the arrays of the layout.

    Args:
      multiple: the main text is padded to the longest example, rounded up to a multiple of this; 0: to its max_tokens.
        The other texts are always padded to theirs.
      pack: the main text is packed like this instead.
    """
    report = Report(examples)
    if spec.beams:
        report.references = [example.references for example in examples]
    weight = np.array([example.weight for example in examples], np.float32)
    batch = {"weight": weight}
    if spec.pictures:
        batch["image"] = np.stack([example.image for example in examples])
    for name, text in spec.texts.items():
        ids, targets = zip(*(example.texts[name] for example in examples), strict=True)
        length = text.max_tokens
        if name == spec.main_text and pack:
            before = list(map(len, ids))
            batch[f"{name}_lengths"] = room = fit_packs(before, pack)
            report.cut = int(np.sum(room.reshape(-1) != before))
            ids, targets = (join(rows, room) for rows in (ids, targets))
            length = pack.tokens
        elif name == spec.main_text and multiple:
            length = min(length, -(-max(map(len, ids)) // multiple) * multiple)
        batch[f"{name}_ids"] = pad(ids, length, text.encoder.pad_id)
        batch[f"{name}_mask"] = pad([[1] * len(row) for row in ids], length, 0)
        if text.predicted:
            batch[f"{name}_targets"] = pad(targets, length, IGNORE)
    return batch | {"report": report}


def fit_packs(lengths: Sequence[int], pack: Pack) -> np.ndarray:
    """Lengths of texts -> int32 (packs, examples of a pack). Without room for all, the longest of a pack are cut."""
    packs = np.array(lengths, np.int32).reshape(-1, pack.examples)
    for row in packs:
        for _ in range(row.sum() - pack.tokens):
            row[row.argmax()] -= 1
    return packs


def join(rows: Sequence[list[int]], lengths: np.ndarray) -> list[list[int]]:
    """The first ids of each row, as many as `lengths` (packs, examples of a pack) says, one list for each pack."""
    each = iter(rows)
    return [[token for length in pack for token in next(each)[:length]] for pack in lengths.tolist()]


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
class Padded:
    """The one batch of a list of examples."""

    collate: Callable[[Sequence[Example]], Batch]

    def __call__(self, examples: list[Example]) -> list[Batch]:
        return [self.collate(examples)]


@dataclass
class Each(grain.experimental.FlatMapTransform):
    """Flattens lists of batches."""

    max_fan_out: int

    def flat_map(self, batches: list[Batch]) -> list[Batch]:
        return batches
