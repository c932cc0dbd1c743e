"""Examples become packs: which captions share a row, how long the row is, and what is cut."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict
from test_data_pipeline import SENTENCE, TEXT, Numbered, assert_equal, config, numbers, spec, take, train

from simvlg_jax.data.batch import Pack
from simvlg_jax.data.batching import fit_packs
from simvlg_jax.data.mixture import parts_of
from simvlg_jax.data.packing import PackPlan, measure, pack_size, plan, room, spread
from simvlg_jax.data.timings import Timings
from simvlg_jax.utils.errors import UserError


def packing(examples=4, tokens=80, together=1, window=4) -> PackPlan:
    return PackPlan(Pack(examples, tokens), together, window)


def packed_captions(batch):
    """The ids of each caption, from the packs."""
    return [
        ids
        for row, lengths in zip(batch["caption_ids"], batch["caption_lengths"], strict=True)
        for ids in (piece.tolist() for piece in np.split(row, np.cumsum(lengths))[:-1])
    ]


def test_packs_hold_each_example_of_the_window_once_beside_its_picture_and_resume():
    source = Numbered(64)
    batches = take(train(source=source, packing=packing()), 16)
    found = []
    for batch in batches:
        assert {name: (x.shape, x.dtype) for name, x in batch.items()} == spec().shapes(8, pack=Pack(4, 80))
        texts = [TEXT.tokenizer.decode(ids) for ids in packed_captions(batch)]
        assert [int(text) for text in texts] == batch["image"][:, 0, 0, 0].tolist()
        found += map(int, texts)
        assert (batch["caption_mask"].sum(1) == batch["caption_lengths"].sum(1)).all()
        assert ((batch["caption_targets"] >= 0).sum(1) == batch["caption_lengths"].sum(1) - 4).all()  # but the starts
    assert sorted(found[:32]) == sorted(n for batch in take(train(source=source), 4) for n in numbers(batch))
    assert sorted(found[:64]) == list(range(64))
    iterator = train(source=source, packing=packing())
    take(iterator, 6)  # in the middle of a window
    resumed = train(source=source, packing=packing())
    resumed.set_state(iterator.get_state())
    assert_equal(batches[6:12], take(resumed, 6))


def test_packs_are_the_same_in_any_number_of_processes():
    whole = take(train(packing=packing(2, 40, 2, 2), batch_size=16), 3)
    halves = [take(train(packing=packing(2, 40, 2, 2), batch_size=16, rows=range(at, at + 8)), 3) for at in (0, 8)]
    joined = [
        {name: np.concatenate([one[name], other[name]]) for name in one} for one, other in zip(*halves, strict=True)
    ]
    assert_equal(whole, joined)


def test_captions_without_room_are_cut_from_their_ends_and_counted():
    timings = Timings()
    (batch,) = take(train(packing=packing(8, 60, window=1), timings=timings), 1)
    (whole,) = take(train(config(pad_multiple=0)), 1)
    rows = zip(whole["caption_ids"].tolist(), whole["caption_mask"].sum(1), strict=True)
    before = [ids[:count] for ids, count in rows]
    after = packed_captions(batch)
    assert sum(map(len, before)) > 60 == sum(map(len, after))
    assert all(short == long[: len(short)] for short, long in zip(after, before, strict=True))
    assert timings.take().cut == sum(len(short) < len(long) for short, long in zip(after, before, strict=True)) > 0
    assert fit_packs([10, 3, 7, 2], Pack(4, 16)).tolist() == [[5, 3, 6, 2]]  # the longest lose most


@given(st.lists(st.integers(1, 32), min_size=1, max_size=12), st.sampled_from([1, 2, 3]))
def test_spread_packs_are_of_equal_size_and_about_equally_long(lengths, size):
    lengths = lengths * size
    packs = spread(lengths, len(lengths) // size)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in pack) for pack in packs]
    assert {len(pack) for pack in packs} == {size} and max(sums) - min(sums) <= max(lengths)


def test_room_is_the_measured_mean_and_a_little_more():
    source = Numbered(1000)  # ten captions of 1 digit, ninety of 2, 900 of 3; start and end come to each
    parts = parts_of(config(), source)
    found = measure(parts, spec(), 2)
    digits = np.array([1] * 10 + [2] * 90 + [3] * 900)
    np.testing.assert_allclose(found, (digits.mean() + 2, digits.std(), 0))  # every record was read, so no error
    assert room(found, 10, 100) == math.ceil(10 * (found.mean + 3 * found.deviation / 10))
    settings = ConfigDict({"pack_tokens": 0.0, "pack_window": 5})
    assert plan(settings, spec(), 10, 2, lambda: found) == PackPlan(Pack(10, room(found, 10, 100)), 2, 5)
    settings.pack_tokens = 6.0
    assert plan(settings, spec(), 10, 2, lambda: found).pack == Pack(10, 60)
    settings.pack_tokens = 4.0
    with pytest.raises(UserError, match=r"captions have 4\.9 tokens on average: set it to 5\.1 or more"):
        plan(settings, spec(), 10, 2, lambda: found)
    with pytest.raises(UserError, match="set it to 0"):
        plan(settings, spec(texts=SENTENCE), 10, 2, lambda: found)


def test_pack_size_divides_the_examples_of_a_device():
    assert [pack_size(ConfigDict({"pack": pack}), 64, 4, 2) for pack in (0, 4, -1)] == [0, 4, 8]
    with pytest.raises(UserError, match="a device has 8 examples of a micro-batch: set it to a divisor of 8"):
        pack_size(ConfigDict({"pack": 3}), 64, 4, 2)
