"""Batches for the training and the evaluation loop, by Grain.

A batch is a dict of numpy arrays (B pictures of this process, side S, L tokens):

    image    uint8 (B, S, S, 3), not normalised
    ids      int32 (B, L), padded on the right
    mask     int32 (B, L), 1 where there is a token
    targets  int32 (B, L), -100 where there is no loss

and in evaluation also

    weight   float32 (B,), 1 for each example that counts; 0 for unreadable pictures and for blanks in the last batch
    index    int32 (B,), position of the example in its source, -1 for those blanks
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import ml_collections
import numpy as np
from absl import flags

from simvlg_jax.data import transforms, workers
from simvlg_jax.data.sources import Source
from simvlg_jax.data.text import IGNORE, TextEncoder
from simvlg_jax.utils.errors import UserError

Batch = dict[str, np.ndarray]
MAX_SKIPS = 100  # pictures in a row that may be unreadable


@dataclass
class Skipped:
    """Counts the unreadable pictures that training met and replaced, since this process began."""

    count: int = 0

    def __call__(self, batch: Batch) -> Batch:
        self.count += int(batch.pop("skipped").sum())
        return batch


class DecodedSource:
    """A source whose pictures are decoded; a record it cannot read is replaced by the next one it can.

    Records gain "skipped", the number of unreadable pictures passed over. Raises UserError when MAX_SKIPS pictures in
    a row are unreadable.
    """

    def __init__(self, source: Source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for skipped in range(min(MAX_SKIPS, len(self))):
            place = (index + skipped) % len(self)
            try:
                record = self._source[place]
                return {**record, "image": transforms.decode(record["image"]), "skipped": skipped}
            except transforms.UNREADABLE as error:
                logging.warning("skipped unreadable picture, record %d: %s", place, error)
        raise UserError(f"{skipped + 1} pictures in a row, from record {index} on, cannot be read")


@dataclass(frozen=True)
class Augment:
    """Decoded record -> training view and tokens; random numbers come from Grain."""

    size: int
    scale: tuple[float, float]
    flip: bool
    encode: TextEncoder
    encode_sentence: TextEncoder | None = None

    def __call__(self, record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        ids, targets = self.encode(record["caption"])
        image = transforms.augment(record["image"], self.size, self.scale, self.flip, rng)
        example = {"image": image, "ids": ids, "targets": targets, "skipped": record["skipped"]}
        if self.encode_sentence is not None:
            example["sentence"] = self.encode_sentence(record["caption"])[0]
        return example


def _pad(rows: Sequence[list[int]], length: int, value: int) -> np.ndarray:
    """Lists of at most `length` ids -> int32 (len(rows), length)."""
    padded = np.full((len(rows), length), value, np.int32)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return padded


def collate(
    examples: Sequence[dict[str, Any]],
    *,
    pad_id: int,
    multiple: int,
    max_tokens: int,
    sentence_encoder: TextEncoder | None = None,
) -> Batch:
    """Examples with "image", "ids", "targets" (and numbers, and "sentence") -> one batch.

    Args:
      sentence_encoder: gave the "sentence" ids, which become "sentence_ids" and "sentence_mask" of its max_tokens.
      multiple: L is the longest example's length rounded up to a multiple of this; 0 stands for L = max_tokens.
    """
    longest = max(len(example["ids"]) for example in examples)
    length = min(max_tokens, -(-longest // multiple) * multiple) if multiple else max_tokens
    ids = [example["ids"] for example in examples]
    batch = {
        "image": np.stack([example["image"] for example in examples]),
        "ids": _pad(ids, length, pad_id),
        "mask": _pad([[1] * len(row) for row in ids], length, 0),
        "targets": _pad([example["targets"] for example in examples], length, IGNORE),
    }
    if sentence_encoder is not None:
        sentences, length = [example["sentence"] for example in examples], sentence_encoder.max_tokens
        batch["sentence_ids"] = _pad(sentences, length, sentence_encoder.pad_id)
        batch["sentence_mask"] = _pad([[1] * len(row) for row in sentences], length, 0)
    if "skipped" in examples[0]:
        batch["skipped"] = np.array([example["skipped"] for example in examples], np.int32)
    return batch


@dataclass(frozen=True)
class LengthGroups:
    """A window of examples -> its batches, each of captions of like length, in random order.

    Every pad costs a step through the language model; within a batch of like captions there are few.
    """

    batch_size: int
    collate: Callable[[Sequence[dict[str, Any]]], Batch]

    def __call__(self, examples: list[dict[str, Any]], rng: np.random.Generator) -> list[Batch]:
        starts = np.arange(0, len(examples), self.batch_size)
        if len(starts) > 1:
            examples = sorted(examples, key=lambda example: len(example["ids"]))
            rng.shuffle(starts)
        return [self.collate(examples[start : start + self.batch_size]) for start in starts]


@dataclass
class _Each(grain.experimental.FlatMapTransform):
    """A list of batches -> its batches."""

    max_fan_out: int

    def flat_map(self, batches: list[Batch]) -> list[Batch]:
        return batches


class RowsOf(grain.MapDataset):
    """These rows of each `size` examples of an endless dataset."""

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


def length_window(data_config: ml_collections.ConfigDict, whole: bool) -> int:
    """How many batches are grouped by length at once: 1 if not the `whole` batch is read here, or nothing is saved."""
    return data_config.length_window if whole and data_config.pad_multiple else 1


def make_train_iterator(
    data_config: ml_collections.ConfigDict,
    source: Source,
    text_encoder: TextEncoder,
    *,
    image_size: int,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
    skipped: Skipped | None = None,
    sentence_encoder: TextEncoder | None = None,
) -> grain.DatasetIterator:
    """Endless training batches of this process.

    Each epoch is a new permutation of the source. A batch holds the same examples in the same order and views however
    many processes share it out. The position (`get_state`, `set_state`) restores order and augmentation exactly; it
    counts batches, so every process has the same, and another number of processes goes on from it. It is valid for the
    same `data_config.workers` only. The batches are the same for any number of workers, unless lengths are grouped:
    then workers take turns with the batches of their windows, which changes the order. If processes share a batch,
    text is padded to `max_tokens` and lengths are not grouped, since all must agree on L.

    Iterate within `workers.signals_blocked`, so that Ctrl-C does not kill workers that are just starting.

    Args:
      data_config: reads crop_scale, flip, pad_multiple, length_window, workers (processes; 0 for none), read_threads.
      batch_size: of all processes together.
      rows: those of each batch that this process reads, see `parallel.mesh.local_rows`; all by default.
      skipped: counts the unreadable pictures, if given.
      sentence_encoder: adds the captions as "sentence_ids" and "sentence_mask", if given.
    """
    rows = range(batch_size) if rows is None else rows
    local, whole = len(rows), len(rows) == batch_size
    if len(source) < batch_size:
        raise UserError(
            f"the data has {len(source)} examples, less than one batch of {batch_size}: lower the batch size"
        )
    augment = Augment(image_size, tuple(data_config.crop_scale), bool(data_config.flip), text_encoder, sentence_encoder)
    augment_seed = int(np.random.SeedSequence([seed, 0]).generate_state(1)[0])  # another than the order's
    collate_fn = functools.partial(
        collate,
        pad_id=text_encoder.pad_id,
        multiple=data_config.pad_multiple if whole else 0,
        max_tokens=text_encoder.max_tokens,
        sentence_encoder=sentence_encoder,
    )
    window = length_window(data_config, whole)
    examples = grain.MapDataset.source(DecodedSource(source)).shuffle(seed).repeat()
    examples = examples.random_map(augment, seed=augment_seed)
    dataset = (
        RowsOf(examples, rows, batch_size)
        .batch(window * local, drop_remainder=True, batch_fn=list)
        .random_map(LengthGroups(local, collate_fn), seed=seed)
        .to_iter_dataset(read_options(data_config.read_threads))
    )
    dataset = grain.experimental.FlatMapIterDataset(dataset, _Each(window))
    if data_config.workers:
        if not flags.FLAGS.is_parsed():  # Grain's worker processes inherit absl flags
            flags.FLAGS.mark_as_parsed()
        workers.start_tracker()
        options = grain.MultiprocessingOptions(num_workers=data_config.workers)
        dataset = dataset.mp_prefetch(options, worker_init_fn=workers.start_worker)
    return iter(dataset.map(Skipped() if skipped is None else skipped))


def read_options(threads: int) -> grain.ReadOptions:
    """Grain reads whole batches ahead: two for each thread bound the memory."""
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)


@dataclass(frozen=True)
class EvalBatch:
    """Number of a batch -> the batch; the work behind `make_eval_batches`."""

    source: Source
    encode: TextEncoder
    size: int
    batch_size: int
    rows: Sequence[int]
    multiple: int

    def _example(self, index: int) -> dict[str, Any]:
        """Raises one of transforms.UNREADABLE."""
        record = self.source[index]
        image = transforms.squash(transforms.decode(record["image"]), self.size)
        return self._with_text(image, record["caption"])

    def _with_text(self, image: np.ndarray, caption: str) -> dict[str, Any]:
        ids, targets = self.encode(caption)
        return {"image": image, "ids": ids, "targets": targets}

    def __call__(self, number: int) -> Batch:
        indices = number * self.batch_size + np.array(self.rows)
        indices = np.where(indices < len(self.source), indices, -1).astype(np.int32)
        blank = self._with_text(np.zeros((self.size, self.size, 3), np.uint8), "")
        examples, counted = [], []
        for index in indices.tolist():
            try:
                example = self._example(index) if index >= 0 else None
            except transforms.UNREADABLE:
                example = None
            examples.append(example or blank)
            counted.append(example is not None)
        batch = collate(
            examples,
            pad_id=self.encode.pad_id,
            multiple=self.multiple,
            max_tokens=self.encode.max_tokens,
        )
        batch["targets"][~np.array(counted)] = IGNORE
        batch["weight"] = np.array(counted, np.float32)
        batch["index"] = indices
        return batch


def make_eval_batches(
    source: Source,
    text_encoder: TextEncoder,
    *,
    image_size: int,
    batch_size: int,
    rows: Sequence[int] | None = None,
    pad_multiple: int = 0,
    read_threads: int = 2,
) -> grain.IterDataset:
    """Each example exactly once, in order; every process gets equally many batches of equal size.

    Blanks of weight 0 without targets fill the last batches and stand in for unreadable pictures, which keep their
    index. Iterate over the result as often as needed.

    Args:
      batch_size: of all processes together.
      rows: those of each batch that this process reads; all by default.
      pad_multiple: as `data.pad_multiple`; 0 gives every batch the same L, as processes that share a batch need.
    """
    rows = range(batch_size) if rows is None else rows
    make = EvalBatch(
        source=source,
        encode=text_encoder,
        size=image_size,
        batch_size=batch_size,
        rows=rows,
        multiple=pad_multiple if len(rows) == batch_size else 0,
    )
    batches = -(-len(source) // batch_size)
    return grain.MapDataset.range(batches).map(make).to_iter_dataset(read_options(read_threads))
