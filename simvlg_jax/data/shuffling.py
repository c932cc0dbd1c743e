"""The order of the records in an epoch: a permutation that needs no memory for each record.

"global" permutes all records, so each is read from another place. "blocks" permutes blocks of neighbouring records, and
then all records within a window of several blocks: storage sees few large reads, and neighbours are still far apart.
"""

import functools
import threading
from collections import deque
from collections.abc import Callable

import grain
import ml_collections
import numpy as np
from grain.experimental import index_shuffle

from simvlg_jax.config.check import lookup

Prefetch = Callable[[int, int], None]
KEPT = 64  # windows that are known to be announced; threads read in few at a time


def shuffled(
    dataset: grain.MapDataset, data_config: ml_collections.ConfigDict, seed: int, prefetch: Prefetch | None = None
) -> grain.MapDataset:
    """Each epoch of the dataset in a new order.

    Args:
      data_config: reads shuffle, block_size and window_blocks.
      prefetch: called with the first record of a block and the one after its last, once for each block when its window
        is first read from. Only "blocks" calls it.
    """
    return lookup(SHUFFLES, "data.shuffle", data_config.shuffle)(dataset, data_config, seed, prefetch)


def _global(
    dataset: grain.MapDataset, data_config: ml_collections.ConfigDict, seed: int, prefetch: Prefetch | None
) -> grain.MapDataset:
    del data_config, prefetch
    return dataset.shuffle(seed)


def _blocks(
    dataset: grain.MapDataset, data_config: ml_collections.ConfigDict, seed: int, prefetch: Prefetch | None
) -> grain.MapDataset:
    order = BlockOrder(len(dataset), data_config.block_size, data_config.window_blocks, seed)
    return BlockShuffle(dataset, order, prefetch)


SHUFFLES = {"global": _global, "blocks": _blocks}  # choices of `data.shuffle`


@functools.lru_cache(maxsize=1024)
def _seed(*words: int) -> int:
    """One independent 32-bit seed for each tuple of words."""
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def _permute(index: int, size: int, seed: int) -> int:
    """The place of `index` in a permutation of range(size)."""
    return index_shuffle(index, max_index=size - 1, seed=seed, rounds=4)


_block_at = functools.lru_cache(maxsize=4096)(_permute)  # a window asks for the same few blocks again and again


@functools.lru_cache(maxsize=64)
def _place_of_last(count: int, seed: int) -> int:
    """The place that `_permute` gives to the last of `count` blocks; a tenth of a second for 100,000 of them."""
    return next(place for place in range(count) if _permute(place, count, seed) == count - 1)


class BlockOrder:
    """The order "blocks" of `size` records. A record's number follows from its place alone."""

    def __init__(self, size: int, block: int, window: int, seed: int):
        """Args:
        block: number of records in a block; the last block of the source may be smaller.
        window: number of blocks in a window.
        """
        self.size, self._block, self._window, self._seed = size, block, window, seed
        self._blocks = -(-size // block)
        self._missing = self._blocks * block - size  # by which the last block is smaller

    def window_of(self, place: int, epoch: int) -> int:
        """The window that the record at a place of an epoch is in."""
        return self._locate(place, epoch)[0] // self._window

    def blocks_of(self, window: int, epoch: int) -> list[tuple[int, int]]:
        """(first record, the one after its last) of each block of a window, in the order of the source."""
        first = window * self._window
        seed = _seed(self._seed, epoch)
        places = range(first, min(first + self._window, self._blocks))
        blocks = sorted(_block_at(place, self._blocks, seed) for place in places)
        return [(block * self._block, min((block + 1) * self._block, self.size)) for block in blocks]

    def record(self, place: int, epoch: int) -> int:
        """The record at a place of an epoch."""
        window = self.window_of(place, epoch)
        first = self._start(window * self._window, epoch)
        end = self._start(min((window + 1) * self._window, self._blocks), epoch)
        place = first + _permute(place - first, end - first, _seed(self._seed, epoch, window))
        block_place, offset = self._locate(place, epoch)
        return _block_at(block_place, self._blocks, _seed(self._seed, epoch)) * self._block + offset

    def _last(self, epoch: int) -> int:
        """The place, among the blocks of an epoch, of the last block of the source, which may be smaller."""
        return _place_of_last(self._blocks, _seed(self._seed, epoch)) if self._missing else self._blocks

    def _start(self, block_place: int, epoch: int) -> int:
        """The place of the first record of the block at a place."""
        return block_place * self._block - self._missing * (block_place > self._last(epoch))

    def _locate(self, place: int, epoch: int) -> tuple[int, int]:
        """(place of its block, offset in the block) of a record's place, as if records were not permuted."""
        last = self._last(epoch)
        if place >= self._start(last + 1, epoch):
            place += self._missing
        return divmod(place, self._block)


class BlockShuffle(grain.MapDataset):
    """A dataset in the order of a `BlockOrder`, over as many epochs as are read."""

    def __init__(self, parent: grain.MapDataset, order: BlockOrder, prefetch: Prefetch | None):
        super().__init__(parent)
        self._order, self._prefetch = order, prefetch
        self._announced: deque[tuple[int, int]] = deque(maxlen=KEPT)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._order.size

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, self._order.size)
        if self._prefetch is not None:
            self._announce(epoch, self._order.window_of(place, epoch))
        return self._parent[epoch * self._order.size + self._order.record(place, epoch)]

    def _announce(self, epoch: int, window: int) -> None:
        with self._lock:  # other threads wait until the blocks are announced
            if (epoch, window) in self._announced:
                return
            self._announced.append((epoch, window))
            for first, end in self._order.blocks_of(window, epoch):
                self._prefetch(first, end)

    def __getstate__(self) -> dict:
        """Pickles for a data worker, which announces its own reads."""
        return self.__dict__ | {"_lock": None, "_announced": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state | {"_lock": threading.Lock(), "_announced": deque(maxlen=KEPT)})
