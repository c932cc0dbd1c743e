"""Parquet files with pictures or paths, and rows about one picture."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparing import assert_own_captions, caption, picture, records, rows, run, skipped, write_parquet, write_pictures

from simvlg_jax.data.readers import listing, repeats


def test_parquet_of_hugging_face(tmp_path):
    folder = tmp_path / "data" / "data"
    write_parquet(folder, 10)
    write_parquet(folder, 2, "validation-00000-of-00001.parquet")
    run(tmp_path / "o", tmp_path / "data")
    run(tmp_path / "o", tmp_path / "data", split="validation")
    assert rows(tmp_path / "o") == [(f"train-00000-of-00001/{n}", [caption(n), caption(n, 1)]) for n in range(10)]
    assert len(records(tmp_path / "o", "validation")) == 2


def test_parquet_with_one_caption_on_each_row(tmp_path):
    numbers = [0, 0, 1, 2, 2, 2]
    table = {"jpg": [picture(n) for n in numbers], "caption": [caption(n, k) for k, n in enumerate(numbers)]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    run(tmp_path / "o", tmp_path / "a.parquet")
    assert [len(texts) for _, texts in rows(tmp_path / "o")] == [2, 1, 3]
    ids = pa.table({"image": [picture(n) for n in range(3)], "caption": ["x"] * 3, "id": [5, 6, 7]})
    pq.write_table(ids, tmp_path / "b.parquet")
    run(tmp_path / "p", tmp_path / "b.parquet")
    assert [name for name, _ in rows(tmp_path / "p")] == ["5", "6", "7"]


def write_scattered(folder: Path, with_paths: bool) -> Path:
    """Two files with the captions 0, 1 and 2 of pictures 0 to 3, one on each row; each caption in its own row group."""
    folder.mkdir()
    turns = [(number, variant) for variant in range(3) for number in range(4)]
    for part, some in enumerate((turns[:5], turns[5:])):
        images = [picture(number) for number, _ in some]
        if with_paths:
            images = [{"bytes": data, "path": f"{n}.png"} for data, (n, _) in zip(images, some, strict=True)]
        table = {"image": images, "text": [caption(*turn) for turn in some], "image_id": [10 + n for n, _ in some]}
        pq.write_table(pa.table(table), folder / f"{part}.parquet", row_group_size=2)
    return folder


@pytest.mark.parametrize("with_paths", [False, True])
def test_rows_of_a_parquet_picture_are_one_record_wherever_they_are(tmp_path, with_paths, monkeypatch):
    monkeypatch.setattr(listing, "SHARD", 2)
    run(tmp_path / "o", write_scattered(tmp_path / "data", with_paths))
    expected = [(str(10 + n), [caption(n, variant) for variant in range(3)]) for n in range(4)]
    assert rows(tmp_path / "o") == expected and skipped(tmp_path / "o") == []
    for record in records(tmp_path / "o"):
        assert_own_captions(record["image"], [text.decode() for text in record["captions"]])


def test_pictures_of_a_parquet_file_with_one_path_or_the_same_bytes_are_apart(tmp_path):
    images = [("x", 0), ("x", 1), ("a", 2), ("b", 2), (None, 3), ("x", 1), (None, 3)]
    table = {
        "image": [{"bytes": picture(number), "path": path} for path, number in images],
        "text": [caption(number, row) for row, (_, number) in enumerate(images)],
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    run(tmp_path / "o", tmp_path / "a.parquet")
    texts = [[int(text[-1]) if "," in text else 0 for text in texts] for _, texts in rows(tmp_path / "o")]
    assert texts == [[0], [1, 5], [2], [3], [4, 6]]


def test_bytes_of_parquet_pictures_with_their_own_paths_are_not_read_to_plan(tmp_path, monkeypatch):
    write_parquet(tmp_path, 4)
    read = []
    monkeypatch.setattr(repeats, "_pictures", lambda file, wanted: read.append(wanted.tolist()) or iter(()))
    run(tmp_path / "o", tmp_path / "train-00000-of-00001.parquet")
    assert read == [[False] * 4] and len(rows(tmp_path / "o")) == 4


def test_rows_without_a_good_caption_or_of_another_split_do_not_lead_a_parquet_picture(tmp_path):
    table = {
        "image": [picture(number) for number in (0, 1, 0, 1, 1, 0)],
        "caption": [["  "], ["val"], ["a", ""], ["b"], ["c"], ["d", "\0"]],
        "split": ["train", "val", "train", None, "train", "train"],
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    run(tmp_path / "o", tmp_path / "a.parquet")
    assert rows(tmp_path / "o") == [("a/2", ["a", "d"]), ("a/3", ["b", "c"])]
    assert skipped(tmp_path / "o") == [
        ("a.parquet, row 0", "caption empty"),
        ("a.parquet, row 2", "caption empty"),
        ("a.parquet, row 5", "caption with NUL"),
    ]
    run(tmp_path / "o", tmp_path / "a.parquet", split="val")
    assert rows(tmp_path / "o", "val") == [("a/1", ["val", "b"])]


def test_parquet_with_paths(tmp_path):
    names = write_pictures(tmp_path / "data", 3)
    table = pa.table({"image_path": [*names, "0.png", None], "caption": [caption(n) for n in (0, 1, 2, 0, 0)]})
    pq.write_table(table, tmp_path / "data" / "a.parquet")
    run(tmp_path / "o", tmp_path / "data" / "a.parquet")
    assert [len(texts) for _, texts in rows(tmp_path / "o")] == [2, 1, 1]
    assert [reason for _, reason in skipped(tmp_path / "o")] == ["no picture"]
