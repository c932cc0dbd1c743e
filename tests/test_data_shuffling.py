"""The order "blocks": a permutation of every epoch, local within its windows, announced to the source."""

import itertools
import pickle

import grain
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from test_data_pipeline import Numbered, config, drawn, numbers, take, train

from simvlg_jax.data.shuffling import BlockOrder, BlockShuffle, shuffled
from simvlg_jax.utils.errors import UserError

SIZES = dict(
    size=st.integers(1, 120), block=st.integers(1, 40), window=st.integers(1, 9), seed=st.integers(0, 2**32 - 1)
)


def epoch_of(order: BlockOrder, epoch: int) -> list[int]:
    return [order.record(place, epoch) for place in range(order.size)]


@settings(deadline=None, max_examples=40)
@given(**SIZES, epoch=st.integers(0, 1000))
def test_each_epoch_has_every_record_once(size, block, window, seed, epoch):
    assert sorted(epoch_of(BlockOrder(size, block, window, seed), epoch)) == list(range(size))


@settings(deadline=None, max_examples=40)
@given(**SIZES, epoch=st.integers(0, 3))
def test_a_window_is_read_at_once_and_has_the_records_of_its_blocks(size, block, window, seed, epoch):
    order = BlockOrder(size, block, window, seed)
    windows = [order.window_of(place, epoch) for place in range(size)]
    assert windows == sorted(windows)
    for number in set(windows):
        blocks = order.blocks_of(number, epoch)
        assert len(blocks) <= window and all(0 < end - start <= block for start, end in blocks)
        records = [record for start, end in blocks for record in range(start, end)]
        assert records == sorted(order.record(place, epoch) for place in range(size) if windows[place] == number)


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [epoch_of(BlockOrder(500, 10, 4, seed), epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_neighbours_in_the_order_are_far_apart_and_blocks_come_in_random_order():
    order = epoch_of(BlockOrder(4096, 64, 8, 0), 0)
    steps = [abs(a - b) for a, b in itertools.pairwise(order)]
    assert sum(step == 1 for step in steps) < 40
    firsts = [order[window * 512] // 64 for window in range(8)]
    assert firsts != sorted(firsts)


def test_a_hundred_million_records_need_no_memory():
    order = BlockOrder(100_000_007, 1024, 16, 5)
    records = {order.record(place, 3) for place in (0, 1, 16_384, 50_000_000, order.size - 1)}
    assert len(records) == 5 and all(0 <= record < order.size for record in records)


class Announced(Numbered):
    """Keeps the ranges that were announced, and checks that each record read lies in one."""

    def __init__(self, count):
        super().__init__(count)
        self.ranges = []

    def prefetch(self, start, stop):
        self.ranges.append((start, stop))

    def __getitem__(self, index):
        assert any(start <= index < stop for start, stop in self.ranges)
        return super().__getitem__(index)


@pytest.mark.parametrize("read_threads", [0, 3])
def test_each_block_is_announced_once_before_it_is_read(read_threads):
    source = Announced(40)
    epoch = drawn(train(config(shuffle="blocks", read_threads=read_threads), source), 5)
    assert sorted(epoch) == list(range(40))
    blocks = [(start, start + 4) for start in range(0, 40, 4)]
    assert set(source.ranges) == set(blocks)
    if not read_threads:  # threads read ahead, in the next epoch
        assert sorted(source.ranges) == blocks


def test_blocks_resume_exactly_and_for_any_number_of_processes():
    data = config(shuffle="blocks")
    straight = train(data, Numbered(43))
    take(straight, 7)  # in the second epoch
    state = straight.get_state()
    rest = [numbers(batch) for batch in take(straight, 6)]
    resumed = train(data, Numbered(43))
    resumed.set_state(state)
    assert [numbers(batch) for batch in take(resumed, 6)] == rest
    halves = [train(data, Numbered(43), rows=rows) for rows in (range(0, 8, 2), range(1, 8, 2))]
    for half in halves:
        half.set_state(state)
    for batch in rest:
        even, odd = (numbers(next(half)) for half in halves)
        assert [number for pair in zip(even, odd, strict=True) for number in pair] == batch


def test_workers_read_in_the_same_order():
    iterator = train(config(shuffle="blocks", workers=2), Numbered(40))
    batches = [numbers(batch) for batch in take(iterator, 6)]
    iterator.close()
    assert batches == [numbers(batch) for batch in take(train(config(shuffle="blocks"), Numbered(40)), 6)]


def test_shuffled_dataset_travels_to_worker_processes():
    dataset = BlockShuffle(grain.MapDataset.source(range(10)), BlockOrder(10, 2, 2, 0), None)
    assert list(pickle.loads(pickle.dumps(dataset))) == list(dataset)


def test_unknown_order_is_refused():
    with pytest.raises(UserError, match=r"data\.shuffle is 'rows'; it takes 'global', 'blocks'"):
        shuffled(grain.MapDataset.source(range(4)), ConfigDict({"shuffle": "rows"}), 0)
