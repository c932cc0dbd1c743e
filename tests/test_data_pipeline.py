"""Grain pipelines: order, resume, sharding, padding, damaged pictures."""

import errno
import io
import json
import struct
import zlib

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict
from PIL import Image, UnidentifiedImageError

from simvlg_jax.config.load import load_config
from simvlg_jax.data import transforms
from simvlg_jax.data.batch import BatchSpec, Pictures, TextSpec
from simvlg_jax.data.captions import CaptionError
from simvlg_jax.data.pipeline import make_eval_batches, make_train_iterator
from simvlg_jax.data.skipped import REASONS, WARNINGS, Skipped, reason
from simvlg_jax.data.sources import RecordInfo, load_source
from simvlg_jax.data.text import IGNORE, CaptionText, SentenceText, character_tokenizer
from simvlg_jax.utils.errors import UserError

TEXT = CaptionText(character_tokenizer(), start_id=1, end_id=2, pad_id=0, max_tokens=24, start_is_target=False)
CAPTION = {"caption": TextSpec(24, predicted=True, load=lambda: TEXT)}
SENTENCE = {"sentence": TextSpec(12, predicted=False, load=lambda: SentenceText(character_tokenizer(), 12))}


def spec(side=16, texts=CAPTION) -> BatchSpec:
    return BatchSpec(Pictures(side), texts)


def config(train=40, **fields) -> ConfigDict:
    return ConfigDict(
        {
            "name": "synthetic",
            "synthetic_size": {"train": train, "val": 11, "test": 11},
            "crop_scale": (0.5, 1.0),
            "flip": True,
            "pad_multiple": 4,
            "reduced_decode": False,
            "workers": 0,
            "read_threads": 1,
            "max_skipped": 0.5,
            "shuffle": "global",
            "block_size": 4,
            "window_blocks": 3,
        }
        | fields
    )


def train(data=None, source=None, layout=None, **options):
    data = data or config()
    settings = {"batch_size": 8, "seed": 3}
    return make_train_iterator(data, source or load_source(data, "train"), layout or spec(), **(settings | options))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key], err_msg=key)


class Numbered:
    """The caption is the record's number, the picture a constant colour."""

    def __init__(self, count, damaged=()):
        self.count, self.damaged = count, damaged

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        index = int(index)
        image = b"damaged" if index in self.damaged else np.full((6, 6, 3), index % 256, np.uint8)
        return {"image": image, "caption": str(index), "references": [str(index)], "id": f"picture {index}"}

    def info(self, index):
        return RecordInfo(f"picture {index}", [str(index)])


class Photos(Numbered):
    """JPEGs of 200 x 160 soft noise."""

    def __getitem__(self, index):
        small = np.random.default_rng(int(index)).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(small).resize((200, 160), Image.Resampling.BICUBIC).save(out, "JPEG", quality=95)
        return super().__getitem__(index) | {"image": b"damaged" if index in self.damaged else out.getvalue()}


def captions(batch) -> list[str]:
    rows = zip(batch["caption_ids"], batch["caption_mask"], strict=True)
    return [TEXT.tokenizer.decode(ids[mask == 1].tolist(), skip_special_tokens=True) for ids, mask in rows]


def numbers(batch) -> list[int]:
    return list(map(int, captions(batch)))


def drawn(iterator, count) -> list[int]:
    return [number for batch in take(iterator, count) for number in numbers(batch)]


def layout_of(batch):
    return {name: (array.shape, array.dtype) for name, array in batch.items()}


def test_batches_have_the_layout_of_their_spec():
    layout = spec(texts=CAPTION | SENTENCE)
    assert layout_of(next(train(config(pad_multiple=0), layout=layout))) == layout.shapes(8)
    (batch,) = make_eval_batches(Numbered(8), layout, batch_size=8)
    assert layout_of(batch) == layout.shapes(8) | {"index": ((8,), np.int32), "skipped": ((8,), np.int32)}


def test_first_text_is_padded_to_the_longest_and_the_others_to_their_limit():
    batch = next(train(layout=spec(texts=CAPTION | SENTENCE)))
    length = batch["caption_ids"].shape[1]
    assert length % 4 == 0 and batch["caption_mask"].sum(1).max() > length - 4
    for ids, mask, targets in zip(batch["caption_ids"], batch["caption_mask"], batch["caption_targets"], strict=True):
        n = mask.sum()
        assert mask.tolist() == [1] * n + [0] * (length - n)
        assert ids[0] == 1 and ids[n - 1] == 2 and (ids[n:] == 0).all()
        assert targets[0] == IGNORE and (targets[1:n] == ids[1:n]).all() and (targets[n:] == IGNORE).all()
    assert batch["sentence_ids"].shape == (8, 12)
    for caption, sentence in zip(batch["caption_ids"], batch["sentence_ids"], strict=True):
        assert sentence.tolist() == [*caption[:11], 2]  # cut, but the end stays


RAW = ['A "Red" Dog!', "It's 1 DOG."]


@pytest.mark.parametrize(
    ("overrides", "expected"), [([], ["a red dog", "it's 1 dog"]), (["--config.data.clean="], RAW)]
)
def test_published_recipe_cleans_captions_in_training_and_loss_but_not_references(tmp_path, overrides, expected):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    lines = [{"image": "a.png", "caption": RAW, "split": split} for split in ("train", "val")]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    overrides = [f"--config.data.path={tmp_path}", "--config.data.workers=0", *overrides]
    data = load_config("configs/pretrain_image.py:data=own", overrides).data
    batch = next(train(data, load_source(data, "train", training=True), batch_size=2))
    assert sorted(captions(batch)) == sorted(expected)
    source = load_source(data, "val")
    (batch,) = make_eval_batches(source, spec(), batch_size=1)
    assert captions(batch) == expected[:1]
    assert source[0]["references"] == source.info(0).references == RAW


def test_tasks_without_pictures_read_texts_only():
    layout = BatchSpec(None, CAPTION)
    source = Numbered(8, damaged=range(8))
    assert sorted(numbers(next(train(config(pad_multiple=0), source, layout)))) == list(range(8))
    (batch,) = make_eval_batches(source, layout, batch_size=8)
    assert numbers(batch) == list(range(8)) and batch["weight"].all()
    assert batch.keys() - layout.shapes(8).keys() == {"index", "skipped"}


def test_pad_multiple_zero_pads_to_max_tokens_and_several_processes_agree():
    assert next(train(config(pad_multiple=0)))["caption_ids"].shape == (8, 24)
    assert next(train(rows=range(4)))["caption_ids"].shape == (4, 24)


def test_each_epoch_is_a_new_permutation():
    iterator = train(source=Numbered(40))
    epochs = [drawn(iterator, 5) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(40))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_processes_share_each_epoch_and_augment_each_example_anew():
    iterators = [train(source=Numbered(40), rows=rows) for rows in ((0, 7), (1, 2), (3, 4), (5, 6))]
    for _ in range(2):
        epoch = sorted(number for iterator in iterators for number in drawn(iterator, 5))
        assert epoch == list(range(40))
    same = [load_source(config(), "train")[0]] * 4
    views = [next(train(source=same, batch_size=2, rows=[i])) for i in range(2)]
    assert (views[0]["image"] != views[1]["image"]).any()


def test_seed_decides_order_and_augmentation():
    assert_equal(take(train(), 3), take(train(), 3))
    assert numbers(next(train(source=Numbered(40), seed=4))) != numbers(next(train(source=Numbered(40), seed=3)))


def test_pictures_are_augmented_anew_in_each_epoch():
    one = config(train=1)
    batches = take(train(one, batch_size=1), 4)
    assert len({batch["image"].tobytes() for batch in batches}) == 4


@pytest.mark.parametrize("read_threads", [0, 2])
def test_resume_is_exact_in_the_middle_of_an_epoch(read_threads):
    data = config(read_threads=read_threads)
    straight = train(data)
    take(straight, 7)  # an epoch has five batches
    state = json.loads(json.dumps(straight.get_state()))
    rest = take(straight, 6)
    resumed = train(data)
    resumed.set_state(state)
    assert_equal(take(resumed, 6), rest)


def test_position_is_saved_with_a_checkpoint(tmp_path):
    straight = train()
    take(straight, 3)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(straight)))
        manager.wait_until_finished()
        rest = take(straight, 2)
        resumed = train()
        manager.restore(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed)))
    assert_equal(take(resumed, 2), rest)


def test_two_workers_give_the_same_batches_and_resume():
    straight = train()
    iterator = train(config(workers=2))
    assert_equal(take(iterator, 3), take(straight, 3))
    state = iterator.get_state()
    rest = take(straight, 3)
    take(iterator, 2)
    iterator.set_state(state)
    assert_equal(take(iterator, 3), rest)
    iterator.close()


def readable(batch) -> list[int]:
    """Numbers of the examples that count; the others are seen to be blank."""
    real = batch["weight"] == 1
    assert (batch["weight"][~real] == 0).all() and (batch["image"][~real] == 0).all()
    assert (batch["caption_targets"][~real] == IGNORE).all()
    assert (batch["caption_ids"][~real, :2] == [1, 2]).all() and (batch["caption_mask"][~real].sum(1) == 2).all()
    return numbers({key: batch[key][real] for key in ("caption_ids", "caption_mask")})


DAMAGED = frozenset({5, 6, 20})


@pytest.mark.parametrize("workers", [0, 2])
def test_records_that_cannot_be_used_are_blank_rows_and_counted_by_reason(capsys, workers):
    skipped = Skipped()
    iterator = train(config(workers=workers), Numbered(40, damaged=DAMAGED), skipped=skipped)
    batches = take(iterator, 5)
    iterator.close()
    assert sorted(number for batch in batches for number in readable(batch)) == sorted(set(range(40)) - DAMAGED)
    assert skipped.counts == {"not a picture": 3} and (skipped.count, skipped.drawn) == (3, 40)
    assert "skipped record 20, 'picture 20': not a picture (" in capsys.readouterr().err
    intact = take(train(source=Numbered(40)), 5)
    for batch, other in zip(batches, intact, strict=True):
        real = batch["weight"] == 1
        assert (batch["image"][real] == other["image"][real]).all()
        assert readable(batch) == np.array(numbers(other))[real].tolist()


def test_blank_rows_are_the_same_for_any_number_of_processes():
    (whole,) = take(train(config(pad_multiple=0), Numbered(16, damaged=range(0, 16, 3)), batch_size=16), 1)
    for rows in (range(16)[::2], (3, 1)):
        (part,) = take(train(config(), Numbered(16, damaged=range(0, 16, 3)), batch_size=16, rows=rows), 1)
        assert_equal([part], [{key: value[list(rows)] for key, value in whole.items()}])


def test_only_the_first_few_of_each_reason_are_named(capsys):
    take(train(config(max_skipped=1.0), Numbered(40, damaged=range(9))), 10)
    assert capsys.readouterr().err.count("skipped record") == WARNINGS


@pytest.mark.parametrize(("count", "damaged", "seen"), [(16, 9, 16), (16, 8, None), (4000, 2600, 1000)])
def test_more_skipped_than_allowed_stop_the_run_after_enough_examples(count, damaged, seen):
    skipped = Skipped()
    iterator = train(source=Numbered(count, damaged=range(damaged)), skipped=skipped)
    if seen is None:
        take(iterator, 4)
        return
    with pytest.raises(UserError, match=rf"{damaged if count == 16 else ''}.* of the first {seen} .* not a picture"):
        take(iterator, 500)
    assert skipped.drawn == seen


def test_only_damaged_pictures_stop_the_run():
    with pytest.raises(UserError, match=r"16 of the first 16 examples cannot be used \(16 not a picture\)"):
        take(train(source=Numbered(10, damaged=range(10))), 2)


class Failing(Numbered):
    """Some records raise an error of their own."""

    def __init__(self, count, errors):
        super().__init__(count)
        self.errors = errors

    def __getitem__(self, index):
        if int(index) in self.errors:
            raise self.errors[int(index)]
        return super().__getitem__(index)


ERRORS = {
    "missing file": FileNotFoundError(errno.ENOENT, "gone"),
    "read error": OSError(errno.EIO, "disk"),
    "too large": OSError(errno.EFBIG, "huge"),
    "truncated": OSError("image file is truncated"),
    "damaged": SyntaxError("broken PNG file"),
    "caption": CaptionError("empty"),
}


def test_errors_of_a_source_have_their_reasons_in_training_and_evaluation():
    source = Failing(16, dict(enumerate(ERRORS.values())))
    skipped = Skipped()
    batches = take(train(source=source, skipped=skipped), 2)
    assert skipped.counts == dict.fromkeys(ERRORS, 1)
    assert sorted(number for batch in batches for number in readable(batch)) == list(range(6, 16))
    (batch,) = make_eval_batches(source, spec(), batch_size=20)
    assert [REASONS[code - 1] for code in batch["skipped"] if code] == list(ERRORS)
    assert batch["weight"].tolist() == [0] * 6 + [1] * 10 + [0] * 4


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PermissionError(errno.EACCES, "no"), "read error"),
        (NotADirectoryError(errno.ENOTDIR, "no"), "missing file"),
        (EOFError(), "truncated"),
        (struct.error(), "truncated"),
        (zlib.error(), "damaged"),
        (ValueError(), "damaged"),
        (UnidentifiedImageError(), "not a picture"),
        (Image.DecompressionBombError(), "too large"),
        (UnicodeDecodeError("utf-8", b"", 0, 1, ""), "caption"),
    ],
)
def test_reason_follows_from_the_error(error, expected):
    assert reason(error) == expected in REASONS


def test_every_error_of_a_damaged_picture_has_a_reason():
    for kind in transforms.UNREADABLE:
        assert reason(kind()) in REASONS


@pytest.mark.parametrize(("count", "processes"), [(11, 1), (11, 2), (3, 4), (8, 2), (1, 4)])
def test_evaluation_sees_each_example_once(count, processes):
    seen, lengths = [], set()
    for index in range(processes):
        rows = range(4)[index::processes]
        batches = list(make_eval_batches(Numbered(count), spec(side=8), batch_size=4, rows=rows))
        lengths.add(len(batches))
        for batch in batches:
            assert batch["image"].shape == (4 // processes, 8, 8, 3)
            assert batch["caption_ids"].shape == (4 // processes, 24)
            assert batch["weight"].dtype == np.float32 and batch["index"].dtype == np.int32
            real = batch["weight"] == 1
            assert (batch["weight"][~real] == 0).all() and (batch["index"][~real] == -1).all()
            assert (batch["caption_targets"][~real] == IGNORE).all() and (batch["image"][~real] == 0).all()
            assert (
                numbers({key: batch[key][real] for key in ("caption_ids", "caption_mask")})
                == batch["index"][real].tolist()
            )
            assert (batch["image"][real] == batch["index"][real][:, None, None, None]).all()
            seen += batch["index"][real].tolist()
    assert sorted(seen) == list(range(count))
    assert lengths == {-(-count // 4)}  # or the processes would wait for each other


def test_evaluation_can_pad_less_and_be_repeated():
    batches = make_eval_batches(Numbered(11), spec(side=8), batch_size=4, pad_multiple=4)
    first = list(batches)
    assert [batch["caption_ids"].shape[1] for batch in first] == [4, 4, 4]
    assert_equal(first, list(batches))


def test_damaged_picture_has_no_weight_and_keeps_its_index():
    first, second, third = make_eval_batches(Numbered(11, damaged={5, 10}), spec(side=8), batch_size=4)
    assert first["weight"].tolist() == [1, 1, 1, 1]
    assert second["weight"].tolist() == [1, 0, 1, 1] and second["index"].tolist() == [4, 5, 6, 7]
    assert third["weight"].tolist() == [1, 1, 0, 0] and third["index"].tolist() == [8, 9, 10, -1]
    assert (second["caption_targets"][1] == IGNORE).all() and (second["image"][1] == 0).all()


def test_tokenizers_are_read_before_the_first_batch():
    def absent():
        raise UserError("no tokenizer")

    layout = spec(texts={"caption": TextSpec(24, predicted=True, load=absent)})
    for make in (lambda: train(layout=layout), lambda: make_eval_batches(Numbered(4), layout, batch_size=4)):
        with pytest.raises(UserError, match="no tokenizer"):
            make()


def test_impossible_batch_sizes_are_refused():
    with pytest.raises(UserError, match="40 examples, less than one batch of 64"):
        train(batch_size=64)


def test_reduced_decoding_keeps_order_and_views_and_changes_pixels_little():
    source = Photos(16)
    (full, reduced) = (take(train(config(reduced_decode=on), source), 3) for on in (False, True))
    for batch, other in zip(full, reduced, strict=True):
        difference = np.abs(batch.pop("image").astype(int) - other.pop("image"))
        assert 0 < difference.mean() < 1.5
    assert_equal(full, reduced)


@pytest.mark.parametrize("on", [False, True])
def test_unreadable_pictures_are_counted_whichever_way_they_are_decoded(on):
    skipped = Skipped()
    iterator = train(config(reduced_decode=on), Photos(16, damaged={3, 4}), skipped=skipped)
    seen = [caption for batch in take(iterator, 2) for caption in captions(batch)]
    assert sorted(seen) == sorted(["", ""] + [str(number) for number in range(16) if number not in (3, 4)])
    assert skipped.counts == {"not a picture": 2}
