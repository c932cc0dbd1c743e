"""Grain pipelines: endless training batches that can be resumed, and evaluation batches that hold each example once.

Both replace or blank unreadable pictures instead of failing. `batch` describes the layout of the batches.
"""

import contextlib
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import grain
import ml_collections
import numpy as np
from absl import flags

from simvlg_jax.data import transforms, workers
from simvlg_jax.data.batch import Batch, BatchSpec
from simvlg_jax.data.batching import Each, Example, LengthGroups, RowsOf, collate
from simvlg_jax.data.sources import Source
from simvlg_jax.data.text import IGNORE
from simvlg_jax.utils.errors import UserError

MAX_SKIPS = 100  # unreadable pictures in a row


@dataclass
class Skipped:
    """Counts the unreadable pictures that training replaced, since this process started."""

    count: int = 0

    def __call__(self, batch: Batch) -> Batch:
        self.count += int(batch.pop("skipped").sum())
        return batch


@dataclass(frozen=True)
class ReadExample:
    """Index of a record -> training example: a random view of the picture, and the encoded texts. Grain gives the rng.

    The next readable record replaces an unreadable one. Raises UserError after MAX_SKIPS unreadable records in a row.

    Attributes:
      reduced: see `transforms.view`.
    """

    source: Source
    spec: BatchSpec
    scale: tuple[float, float]
    flip: bool
    reduced: bool

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        for skipped in range(min(MAX_SKIPS, len(self.source))):
            place = (index + skipped) % len(self.source)
            try:
                record = self.source[place]
                image = self.spec.pictures and self._view(record["image"], rng)
            except transforms.UNREADABLE as error:
                logging.warning("skipped unreadable picture, record %d: %s", place, error)
            else:
                return Example(image, self.spec.encode(record["caption"]), skipped)
        raise UserError(f"{skipped + 1} pictures in a row, from record {index} on, cannot be read")

    def _view(self, image: bytes | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return transforms.view(image, self.spec.pictures.side, self.scale, self.flip, rng, reduced=self.reduced)


def examples(data_config: ml_collections.ConfigDict, source: Source, spec: BatchSpec, seed: int) -> grain.MapDataset:
    """Endless training examples of one source: each epoch is a new permutation with new random views.

    Args:
      data_config: reads crop_scale, flip and reduced_decode.
    """
    scale, reduced = tuple(data_config.crop_scale), bool(data_config.reduced_decode)
    read = ReadExample(source, spec, scale, bool(data_config.flip), reduced)
    augment_seed = int(np.random.SeedSequence([seed, 0]).generate_state(1)[0])  # independent of the order's
    return grain.MapDataset.range(len(source)).shuffle(seed).repeat().random_map(read, seed=augment_seed)


def length_window(data_config: ml_collections.ConfigDict, whole: bool) -> int:
    """Number of batches that are grouped by length together.

    It is 1 (no grouping) unless this process reads the `whole` batch and pads it to less than max_tokens.
    """
    return data_config.length_window if whole and data_config.pad_multiple else 1


def make_train_iterator(
    data_config: ml_collections.ConfigDict,
    source: Source,
    spec: BatchSpec,
    *,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
    skipped: Skipped | None = None,
) -> grain.DatasetIterator:
    """Endless training batches of this process.

    The first text of the spec is padded to `data_config.pad_multiple` and grouped by length. When processes share a
    batch, all must agree on its shape, so they pad to max_tokens and do not group.

    A batch holds the same examples, in the same order and views, for any number of processes and any number of
    workers. One exception: with length groups, workers take turns with the batches of their windows, which changes the
    order.

    The position (`get_state`, `set_state`) restores order and augmentation exactly. It counts batches, so all
    processes have the same position and a run can resume with another number of processes. It is valid only for the
    same `data_config.workers`.

    Iterate within `workers.signals_blocked`, so that Ctrl-C does not kill workers that are starting.

    Args:
      data_config: reads crop_scale, flip, reduced_decode, pad_multiple, length_window, workers (processes; 0 for none),
        read_threads.
      batch_size: global, over all processes.
      rows: rows of each batch that this process reads, see `parallel.mesh.local_rows`; default: all.
      skipped: counts the unreadable pictures.
    """
    rows = range(batch_size) if rows is None else rows
    local, whole = len(rows), len(rows) == batch_size
    if len(source) < batch_size:
        raise UserError(
            f"the data has {len(source)} examples, less than one batch of {batch_size}: lower the batch size"
        )
    spec.encode("")  # reads the tokenizers now, so that their errors come before the first batch
    window = length_window(data_config, whole)
    collate_fn = functools.partial(collate, spec=spec, multiple=data_config.pad_multiple if whole else 0)
    dataset = (
        RowsOf(examples(data_config, source, spec, seed), rows, batch_size)
        .batch(window * local, drop_remainder=True, batch_fn=list)
        .random_map(LengthGroups(local, spec.main_text, collate_fn), seed=seed)
        .to_iter_dataset(_read_options(data_config.read_threads))
    )
    dataset = grain.experimental.FlatMapIterDataset(dataset, Each(window))
    if data_config.workers:
        if not flags.FLAGS.is_parsed():  # Grain's worker processes inherit absl flags
            flags.FLAGS.mark_as_parsed()
        workers.start_tracker()
        options = grain.MultiprocessingOptions(num_workers=data_config.workers)
        dataset = dataset.mp_prefetch(options, worker_init_fn=workers.start_worker)
    return iter(dataset.map(Skipped() if skipped is None else skipped))


def _read_options(threads: int) -> grain.ReadOptions:
    """Limits memory: Grain reads whole batches ahead, here two for each thread."""
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)


@dataclass(frozen=True)
class EvalBatch:
    """Number of a batch -> the batch; the work behind `make_eval_batches`."""

    source: Source
    spec: BatchSpec
    blank: Example
    batch_size: int
    rows: Sequence[int]
    multiple: int

    def _example(self, index: int) -> Example:
        """Raises one of transforms.UNREADABLE."""
        record = self.source[index]
        pictures = self.spec.pictures
        image = pictures and transforms.squash(transforms.pixels(record["image"]), pictures.side)
        return Example(image, self.spec.encode(record["caption"]))

    def _example_or_blank(self, index: int) -> Example:
        """The blank example replaces an unreadable picture and an index of -1."""
        with contextlib.suppress(*transforms.UNREADABLE):
            if index >= 0:
                return self._example(index)
        return self.blank

    def __call__(self, number: int) -> Batch:
        indices = number * self.batch_size + np.array(self.rows)
        indices = np.where(indices < len(self.source), indices, -1).astype(np.int32)
        batch = collate(list(map(self._example_or_blank, indices.tolist())), spec=self.spec, multiple=self.multiple)
        blank = batch.pop("skipped") > 0
        for name, text in self.spec.texts.items():
            if text.predicted:
                batch[f"{name}_targets"][blank] = IGNORE
        return batch | {"weight": (~blank).astype(np.float32), "index": indices}


def make_eval_batches(
    source: Source,
    spec: BatchSpec,
    *,
    batch_size: int,
    rows: Sequence[int] | None = None,
    pad_multiple: int = 0,
    read_threads: int = 2,
) -> grain.IterDataset:
    """Each example exactly once, in order; all processes get the same number of batches of the same size.

    Blank examples of weight 0 and without targets fill the last batch and replace unreadable pictures, which keep
    their index. The result can be iterated over repeatedly.

    Args:
      batch_size: global, over all processes.
      rows: rows of each batch that this process reads; default: all.
      pad_multiple: as `data.pad_multiple`. Processes that share a batch pad to max_tokens.
    """
    rows = range(batch_size) if rows is None else rows
    multiple = pad_multiple if len(rows) == batch_size else 0
    image = spec.pictures and np.zeros(spec.pictures.shape(1)[1:], np.uint8)
    make = EvalBatch(source, spec, Example(image, spec.encode(""), skipped=1), batch_size, rows, multiple)
    batches = -(-len(source) // batch_size)
    return grain.MapDataset.range(batches).map(make).to_iter_dataset(_read_options(read_threads))
