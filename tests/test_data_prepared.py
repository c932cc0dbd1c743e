"""Prepared data: records come with their own texts, from ArrayRecord files and from tars, and damage is found."""

import io
import pickle
import tarfile
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from ml_collections import ConfigDict

from simvlg_jax.config.defaults import get_config
from simvlg_jax.data import read_ahead as ahead
from simvlg_jax.data.index import Row, Tar, write_index
from simvlg_jax.data.sources import load_source
from simvlg_jax.utils.errors import UserError

ITEMS = [
    ("a", b"picture of a", ["first of a", "second of a", "third of a"]),
    ("b", b"picture of b, longer", ["only of b"]),
    ("c", b"c", ["first of c", "second of c"]),
]
FEATURES = {
    "id": tfds.features.Text(),
    "image": tfds.features.Image(shape=(None, None, 3)),
    "captions": tfds.features.Sequence(tfds.features.Text()),
}


def write_shards(folder, items=ITEMS, question=None):
    """Writes two ArrayRecord files, their TFDS metadata and the index; the first file holds one record."""
    features = tfds.features.FeaturesDict(FEATURES)
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    for number, part in enumerate((items[:1], items[1:])):
        writer = array_record_module.ArrayRecordWriter(
            str(folder / f"pictures-train.array_record-{number:05d}-of-00002"), "group_size:1"
        )
        for name, image, captions in part:
            example = features.encode_example({"id": name, "image": image, "captions": captions})
            writer.write(serializer.serialize_example(example))
        writer.close()
    template = tfds.core.ShardedFileTemplate(
        folder, dataset_name="pictures", split="train", filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name="train", shard_lengths=[1, len(items) - 1], num_bytes=0, filename_template=template
    )
    tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=[split], check_data=False)
    write_index(folder / "index-train.arrow", [Row(name, texts, question) for name, _, texts in items])


def write_tars(folder, items=ITEMS):
    """Writes two tars and their index; the first tar holds one picture."""
    rows, tars = [], []
    for number, part in enumerate((items[:1], items[1:])):
        path = folder / f"{number}.tar"
        with tarfile.open(path, "w") as tar:
            for name, image, _ in part:
                member = tarfile.TarInfo(f"{name}.jpg")
                member.size = len(image)
                tar.addfile(member, io.BytesIO(image))
        with tarfile.open(path) as tar:
            for (name, _, texts), member in zip(part, tar, strict=True):
                rows.append(Row(name, texts, None, number, member.offset_data, member.size))
        tars.append(Tar(str(path), path.stat().st_size))
    write_index(folder / "index-train.arrow", rows, tars=tars)


KINDS = pytest.mark.parametrize("write", [write_shards, write_tars])


def config(folder) -> ConfigDict:
    data = get_config().data
    data.name, data.path = "prepared", str(folder)
    return data


@KINDS
def test_training_has_a_record_for_each_caption(tmp_path, write):
    write(tmp_path)
    source = pickle.loads(pickle.dumps(load_source(config(tmp_path), "train", training=True)))
    records = [source[i] for i in range(len(source))]
    assert [(r["id"], r["image"], r["caption"]) for r in records] == [
        (name, image, text) for name, image, texts in ITEMS for text in texts
    ]
    with pytest.raises(IndexError):
        source[len(source)]


@KINDS
def test_evaluation_has_a_record_for_each_picture(tmp_path, write):
    write(tmp_path)
    source = load_source(config(tmp_path), "train")
    assert [(r["id"], r["image"], r["caption"], r["references"]) for r in (source[i] for i in range(len(source)))] == [
        (name, image, texts[0], texts) for name, image, texts in ITEMS
    ]
    assert [tuple(source.info(i)[:2]) for i in range(3)] == [(name, texts) for name, _, texts in ITEMS]


@KINDS
def test_reading_ahead_changes_nothing(tmp_path, write):
    write(tmp_path)
    source = load_source(config(tmp_path), "train", training=True)
    source.prefetch(0, len(source))
    source.prefetch(2, 4)
    assert source[5]["image"] == b"c"
    for path in tmp_path.iterdir():
        if path.suffix == ".tar" or "array_record" in path.name:
            path.unlink()
    source.prefetch(0, len(source))  # whoever reads the records meets the error


def test_read_ahead_reads_the_range(tmp_path, monkeypatch):
    """What the thread reads is seen at the file's own readinto."""
    (tmp_path / "f").write_bytes(bytes(range(250)))
    read, done = bytearray(), threading.Event()

    class File(io.FileIO):
        def readinto(self, buffer):
            count = super().readinto(buffer)
            read.extend(buffer[:count])
            if len(read) >= 90:
                done.set()
            return count

    monkeypatch.setattr(ahead, "open", lambda path, mode, buffering: File(path), raising=False)
    monkeypatch.setattr(ahead, "PIECE", 40)
    ahead._ranges.cache_clear()
    ahead.read_ahead(str(tmp_path / "absent"), 0, 5)
    ahead.read_ahead(str(tmp_path / "f"), 10, 100)
    assert done.wait(30)
    assert bytes(read) == bytes(range(10, 100))
    ahead._ranges.cache_clear()


def test_a_question_is_one_record_with_its_answers_as_choices(tmp_path):
    write_shards(tmp_path, [("q1", b"x", ["no", "yes", "yes"]), ("q2", b"y", ["two", "2", "2", "two"])], "what?")
    source = load_source(config(tmp_path), "train", training=True)
    assert [source[i]["caption"] for i in range(len(source))] == ["yes", "two"]
    assert source[0]["prompt"] == "Question: what? Short answer:"
    assert source[0]["choices"] == ["no", "yes", "yes"]


def test_a_split_that_was_not_prepared_is_named_with_those_that_were(tmp_path):
    write_tars(tmp_path)
    with pytest.raises(UserError, match=r'no prepared split "val" \(it has train\)'):
        load_source(config(tmp_path), "val")


def test_an_index_of_other_data_is_refused(tmp_path):
    write_shards(tmp_path)
    write_index(tmp_path / "index-train.arrow", [Row("a", ["b"])])
    with pytest.raises(UserError, match="does not fit"):
        load_source(config(tmp_path), "train")
    write_index(tmp_path / "index-train.arrow", [Row(name, ["b"]) for name in "xyz"])
    with pytest.raises(UserError, match="'a', in the index 'x'"):
        load_source(config(tmp_path), "train")[0]


@KINDS
@pytest.mark.parametrize("damage", ["deleted", "truncated", "zeroed"])
def test_a_shard_damaged_under_way_makes_its_records_unreadable(tmp_path, write, damage):
    write(tmp_path)
    source = load_source(config(tmp_path), "train")
    file = sorted(path for path in tmp_path.iterdir() if path.suffix == ".tar" or "array_record" in path.name)[1]
    if damage == "deleted":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:700])
    else:
        file.write_bytes(bytes(100))
    assert source[0]["image"] == b"picture of a"
    for index in (1, 2):
        with pytest.raises(OSError):
            source[index]


def test_a_tar_that_grew_is_not_read(tmp_path):
    write_tars(tmp_path)
    with (tmp_path / "0.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(OSError, match="changed since it was indexed"):
        load_source(config(tmp_path), "train")[0]


def test_many_records_open_without_being_read(tmp_path):
    """Opening reads no text: of 200,000 captions of a row each, only the counts are touched."""
    write_index(
        tmp_path / "index-train.arrow",
        (Row(str(i), ["a", "b"][: 1 + i % 2], tar=0, offset=0, size=1) for i in range(200_000)),
        tars=[Tar("absent.tar", 1)],
    )
    source = load_source(config(tmp_path), "train", training=True)
    assert len(source) == 300_000
    assert source.info(299_999)[:2] == ("199999", ["a", "b"])
    np.testing.assert_array_equal([int(source.info(i).id) for i in range(7)], [0, 1, 1, 2, 3, 3, 4])
