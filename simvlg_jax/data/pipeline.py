"""Grain pipelines: endless training batches that can be resumed, and evaluation batches that hold each example once.

A record that cannot be used is counted, and its row stays blank. `batch` describes the layout of the batches.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import grain
import ml_collections
import numpy as np
from absl import flags

from simvlg_jax.data import transforms, workers
from simvlg_jax.data.batch import Batch, BatchSpec
from simvlg_jax.data.batching import Each, Example, Padded, RowsOf, collate, pad_prompts
from simvlg_jax.data.examples import blank, untargeted
from simvlg_jax.data.mixture import mixed_examples, parts_of
from simvlg_jax.data.packing import PackPlan, Packs
from simvlg_jax.data.receiving import Receive, Received
from simvlg_jax.data.skipped import MIN_DRAWN, REASONS, Skip, Skipped, reason
from simvlg_jax.data.sources import Source
from simvlg_jax.data.timings import Timings
from simvlg_jax.data.views import View, view_of
from simvlg_jax.utils.errors import UserError, first_line

PROBED = 100  # records that are read to learn whether a source has prompts


def make_train_iterator(
    data_config: ml_collections.ConfigDict,
    source: Source,
    spec: BatchSpec,
    *,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
    packing: PackPlan | None = None,
    skipped: Skipped | None = None,
    timings: Timings | None = None,
) -> grain.DatasetIterator:
    """Endless training batches of this process.

    The first text of the spec is packed, or padded to `data_config.pad_multiple`. When processes share a batch that is
    not packed, all must agree on its shape, so they pad to max_tokens.

    A batch holds the same examples, in the same order and views, for any number of processes and any number of
    workers. One exception: if texts are spread over several batches, workers take turns with the batches of their
    windows, which changes the order.

    The position (`get_state`, `set_state`) restores order and augmentation exactly, also in the middle of a mixture. It
    counts batches, so all processes have the same position and a run can resume with another number of processes. It is
    valid only for the same `data_config.workers`.

    Iterate within `workers.signals_blocked`, so that Ctrl-C does not kill workers that are starting. Iterating raises
    UserError if too many records are skipped.

    Args:
      data_config: reads crop_scale, flip, reduced_decode, shuffle, block_size, window_blocks, pad_multiple,
        workers (processes; 0 for none), read_threads, max_skipped.
      source: what `mixture.load_training` gives.
      batch_size: global, over all processes.
      rows: rows of each batch that this process reads, see `parallel.mesh.local_rows`; default: all.
      packing: how examples share rows; None: each has its own.
      skipped, timings: count what this process receives.
    """
    rows = range(batch_size) if rows is None else rows
    local, whole = len(rows), len(rows) == batch_size
    if len(source) < batch_size:
        raise UserError(
            f"the data has {len(source)} examples, less than one batch of {batch_size}: lower train.batch_size"
        )
    spec.encode("")  # reads the tokenizers now, so that their errors come before the first batch
    parts, window = parts_of(data_config, source), packing.window if packing else 1
    drawn = RowsOf(mixed_examples(parts, spec, seed), rows, batch_size)
    drawn = drawn.batch(window * local, drop_remainder=True, batch_fn=list)
    if packing:
        packed = functools.partial(collate, spec=spec, multiple=0, pack=packing.pack)
        lists = drawn.random_map(Packs(packing, rows, spec.main_text, packed), seed=seed)
    else:
        multiple = data_config.pad_multiple if whole else 0
        lists = drawn.map(Padded(functools.partial(collate, spec=spec, multiple=multiple)))
    dataset = grain.experimental.FlatMapIterDataset(
        lists.to_iter_dataset(_read_options(data_config.read_threads)), Each(window)
    )
    if data_config.workers:
        if not flags.FLAGS.is_parsed():  # Grain's worker processes inherit absl flags
            flags.FLAGS.mark_as_parsed()
        workers.start_tracker()
        options = grain.MultiprocessingOptions(num_workers=data_config.workers)
        dataset = dataset.mp_prefetch(options, worker_init_fn=workers.start_worker)
    enough = min(MIN_DRAWN, len(source)) * local // batch_size  # this process's share of them
    receive = Receive(
        parts,
        Skipped() if skipped is None else skipped,
        Timings() if timings is None else timings,
        data_config.max_skipped,
        enough,
    )
    return iter(Received(dataset, receive))


def _read_options(threads: int) -> grain.ReadOptions:
    """Limits memory: Grain reads whole batches ahead, here two for each thread."""
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)


@dataclass(frozen=True)
class EvalBatch:
    """Number of a batch -> the batch; the work behind `make_eval_batches`.

    Attributes:
      blank: fills up the last batch.
      prompted: whether records have prompts of their own.
    """

    source: Source
    spec: BatchSpec
    view: View | None
    blank: Example
    batch_size: int
    rows: Sequence[int]
    multiple: int
    prompted: bool

    def _example(self, index: int) -> tuple[Example, str]:
        """An example and its prompt; a blank one for a record that cannot be used, and for an index of -1."""
        if index < 0:
            return self.blank, ""
        try:
            record = self.source[index]
            prompt = record.get("prompt", "")
            texts = self.spec.encode(record["caption"], prompt)
            if not record["references"]:  # nothing to learn or to compare with, such as a test split without answers
                texts = untargeted(texts)
            return Example(self.view and self.view.evaluate(record), texts), prompt
        except transforms.UNREADABLE as error:
            return self.blank._replace(skip=Skip(reason(error), first_line(error), index, "")), ""

    def __call__(self, number: int) -> Batch:
        indices = number * self.batch_size + np.array(self.rows)
        indices = np.where(indices < len(self.source), indices, -1).astype(np.int32)
        examples, prompts = zip(*map(self._example, indices.tolist()), strict=True)
        batch = collate(examples, spec=self.spec, multiple=self.multiple)
        del batch["report"]
        codes = [0 if example.skip is None else 1 + REASONS.index(example.skip.reason) for example in examples]
        batch |= {"index": indices, "skipped": np.array(codes, np.int32)}
        return batch | self._prompts(prompts) if self.prompted else batch

    def _prompts(self, prompts: Sequence[str]) -> Batch:
        """The arrays of the prompts."""
        text = next(text for text in self.spec.texts.values() if text.predicted)
        ids, mask = pad_prompts(text.encoder, prompts, self.multiple)
        return {"prompt_ids": ids, "prompt_mask": mask}


def _has_prompts(source: Source, spec: BatchSpec) -> bool:
    """Whether the first record that can be read has a prompt, and the task a text that follows it."""
    if not any(text.predicted for text in spec.texts.values()):
        return False
    for index in range(min(PROBED, len(source))):
        try:
            return bool(source[index].get("prompt"))
        except transforms.UNREADABLE:
            continue
    return False


def make_eval_batches(
    source: Source,
    spec: BatchSpec,
    *,
    batch_size: int,
    rows: Sequence[int] | None = None,
    pad_multiple: int = 0,
    read_threads: int = 2,
    start: int = 0,
) -> grain.IterDataset:
    """Each example exactly once, in order; all processes get the same number of batches of the same size.

    Blank examples of weight 0 and without targets fill the last batch and replace records that cannot be used, which
    keep their index. The result can be iterated over repeatedly.

    Args:
      batch_size: global, over all processes.
      rows: rows of each batch that this process reads; default: all.
      pad_multiple: as `data.pad_multiple`. Processes that share a batch pad to max_tokens.
      start: number of the first batch.
    """
    rows = range(batch_size) if rows is None else rows
    multiple = pad_multiple if len(rows) == batch_size else 0
    view, prompted = view_of(spec.pictures), _has_prompts(source, spec)
    make = EvalBatch(source, spec, view, blank(spec), batch_size, rows, multiple, prompted)
    batches = -(-len(source) // batch_size)
    return grain.MapDataset.range(start, batches).map(make).to_iter_dataset(_read_options(read_threads))
