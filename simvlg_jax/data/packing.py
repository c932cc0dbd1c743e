"""Packs: captions of several examples one after the other in a row of fixed length, so that none is padded.

A pack has room for its captions together and not for the longest of each. The room is fixed before training, so one
compiled program serves the run, and processes need not agree on a length. The captions of neighbouring packs are spread
over them so that all packs are about equally full.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import ml_collections
import numpy as np

from simvlg_jax.data import transforms
from simvlg_jax.data.batch import Batch, BatchSpec, Pack
from simvlg_jax.data.batching import Example
from simvlg_jax.data.mixture import Part
from simvlg_jax.utils.errors import UserError

SAMPLE = 2048  # records of each source whose captions are measured
DEVIATIONS = 3  # by how many standard deviations the room exceeds the mean: one pack in 700 is cut


class Lengths(NamedTuple):
    """Mean and standard deviation of a text's tokens, and the standard error of the mean."""

    mean: float
    deviation: float
    error: float


@dataclass(frozen=True)
class PackPlan:
    """How the examples of a process become packs.

    Attributes:
      pack: the layout of a pack.
      together: number of neighbouring packs of a batch over which captions are spread.
      window: number of batches over which captions are spread.
    """

    pack: Pack
    together: int
    window: int


def pack_size(data_config: ml_collections.ConfigDict, batch_size: int, shards: int, accumulate: int) -> int:
    """Returns the number of examples of a pack; 0 if captions are padded.

    Args:
      batch_size: global.
      shards: number of devices that share a batch.
      accumulate: micro-batches.

    Raises:
      UserError (status 2): packs of `data.pack` examples do not divide the micro-batches of the devices.
    """
    rows = batch_size // (shards * accumulate)
    size = rows if data_config.pack == -1 else data_config.pack
    if size and rows % size:
        raise UserError(
            f"data.pack is {size}, and a device has {rows} examples of a micro-batch: set it to a divisor of {rows}, "
            "or to -1 for one pack",
            2,
        )
    return size


def measure(parts: Sequence[Part], spec: BatchSpec, threads: int) -> Lengths:
    """Returns the lengths of the main text in training, from evenly spread records of every part.

    Raises:
      UserError: none of these records has a text.
    """
    found = []
    with ThreadPoolExecutor(threads) as pool:
        for part in parts:
            numbers = np.linspace(0, len(part.source) - 1, min(SAMPLE, len(part.source))).astype(int).tolist()
            of_record = pool.map(lambda number, part=part: _tokens(part, spec, number), numbers)
            found.append(np.array([length for lengths in of_record for length in lengths]))
    if not any(map(len, found)):
        raise UserError("no caption can be read, so their length is unknown: mend the data, or set data.pack=0")
    readable = [(part, lengths) for part, lengths in zip(parts, found, strict=True) if len(lengths)]
    weights = np.array([part.weight for part, _ in readable])
    weights /= weights.sum()
    means, variances = np.array([(lengths.mean(), lengths.var()) for _, lengths in readable]).T
    unseen = [max(0.0, 1 - SAMPLE / len(part.source)) for part, _ in readable]
    errors = [variance / len(lengths) for variance, (_, lengths) in zip(variances, readable, strict=True)]
    mean = weights @ means
    return Lengths(
        float(mean),
        float(np.sqrt(weights @ (variances + (means - mean) ** 2))),
        float(np.sqrt(weights**2 @ (np.array(errors) * unseen))),
    )


def _tokens(part: Part, spec: BatchSpec, number: int) -> list[int]:
    """The lengths of a record's texts; empty if it cannot be read."""
    try:
        record = part.source[number]
        texts = record.get("choices", [record["caption"]])
        return [len(spec.encode(text, record.get("prompt", ""))[spec.main_text][0]) for text in texts]
    except transforms.UNREADABLE:
        return []


def room(lengths: Lengths, examples: int, spread: int) -> int:
    """Returns the text tokens of a pack, of which captions of these lengths seldom need more.

    Args:
      examples: of a pack.
      spread: number of examples over which captions are spread.
    """
    slack = DEVIATIONS * math.hypot(lengths.deviation / math.sqrt(spread), lengths.error)
    return math.ceil(examples * (lengths.mean + slack))


def plan(
    data_config: ml_collections.ConfigDict,
    spec: BatchSpec,
    examples: int,
    accumulate: int,
    lengths: Callable[[], Lengths],
) -> PackPlan:
    """Returns how examples are packed.

    Args:
      data_config: reads pack_tokens and pack_window.
      examples: of a pack, from `pack_size`.
      accumulate: micro-batches; each has its own packs.
      lengths: measures the captions.

    Raises:
      UserError (status 2): the task predicts no text, or `data.pack_tokens` is too little for these captions.
    """
    text = spec.texts[spec.main_text]
    if not text.predicted:
        raise UserError("data.pack is for captions that are predicted, and this task predicts none: set it to 0", 2)
    found, window = lengths(), data_config.pack_window
    tokens = room(found, examples, examples * accumulate * window)
    if given := data_config.pack_tokens:
        tokens = math.ceil(examples * given)
        if tokens < examples * found.mean:
            raise UserError(
                f"data.pack_tokens is {given:g}, and captions have {found.mean:.1f} tokens on average: set it to "
                f"{found.mean * 1.05:.1f} or more, or to 0 to measure it",
                2,
            )
    return PackPlan(Pack(examples, min(tokens, examples * text.max_tokens)), accumulate, window)


@dataclass(frozen=True)
class Packs:
    """Splits a window of examples into batches of packs.

    A pack has neighbouring rows of a batch, so a batch is the same for any number of processes.

    Attributes:
      rows: the rows of each batch that this process reads.
      text: name of the packed text.
    """

    packing: PackPlan
    rows: Sequence[int]
    text: str
    collate: Callable[[Sequence[Example]], Batch]

    def __call__(self, examples: list[Example], rng: np.random.Generator) -> list[Batch]:
        together, size, seed = self.packing.together, self.packing.pack.examples, int(rng.integers(2**32))
        batches: list[list[Example]] = [[] for _ in range(self.packing.window)]
        for first in range(0, len(self.rows), together * size):
            starts = range(first, len(examples), len(self.rows))
            near = [example for start in starts for example in examples[start : start + together * size]]
            packs = spread([len(example.texts[self.text][0]) for example in near], len(near) // size)
            np.random.default_rng([seed, self.rows[first]]).shuffle(packs)
            for number, pack in enumerate(packs):
                batches[number // together] += [near[index] for index in pack]
        return [self.collate(batch) for batch in batches]


def spread(lengths: Sequence[int], packs: int) -> list[list[int]]:
    """Returns the indices of lengths in packs of equal size and about equal sums: the longest first, to the emptiest.

    Args:
      packs: their number, a divisor of the number of lengths.
    """
    size = len(lengths) // packs
    found: list[list[int]] = [[] for _ in range(packs)]
    open_packs = [(0, number) for number in range(packs)]  # a heap of (sum, pack)
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        total, number = heapq.heappop(open_packs)
        found[number].append(index)
        if len(found[number]) < size:
            heapq.heappush(open_packs, (total + lengths[index], number))
    return [sorted(pack) for pack in found]
