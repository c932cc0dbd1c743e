"""Damaged sources in every format: no crash, no hang, and no picture with the caption of another.

Names and captions hold a checksum, so that damage does not turn one into that of another picture.
"""

import collections
import contextlib
import csv
import io
import json
import re
import shutil
import signal
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import preparing
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from simvlg_jax.data.index import Index
from simvlg_jax.data.preparing.shard import Job, prepare_shard
from simvlg_jax.data.preparing.staging import Staging
from simvlg_jax.data.readers import Options, choose, listing
from simvlg_jax.utils.errors import UserError

SEED = 13
COUNT = 6  # pictures of a source
PATIENCE_SECONDS = 60  # for one source
ODD = [None, True, 0, -1, 1e308, "", " ", "x" * 20_000, "a\0b", "\ud83d", [], {}, [[]], [None], {"bytes": 3}, ["a", 3]]
ODD += ["/etc/passwd", "../..", "http://x/y.jpg", "\n", {"raw": "hello"}, 10**400, "a/" * 3000]


def checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def caption(number: int, variant: int = 0) -> str:
    text = f"picture {number} {variant}"
    return f"{text} {checksum(text)}"


def name(number: int) -> str:
    return f"{number}-{checksum(str(number))}"


def number_of(text: str) -> int | None:
    """Which picture a caption is of; None if it was damaged."""
    match = re.fullmatch(r"(picture (\d+) \d+) (\w{8})", text)
    return int(match[2]) if match and match[3] == checksum(match[1]) else None


IMAGES = [preparing.picture(number, "JPEG" if number % 2 else "PNG") for number in range(COUNT)]


def pictures(folder: Path, suffix: str = ".jpg") -> None:
    for number, data in enumerate(IMAGES):
        (folder / f"{name(number)}{suffix}").write_bytes(data)


def files(folder: Path) -> list[Path]:
    pictures(folder)
    for number in range(COUNT):
        path = folder / f"{name(number)}.txt"
        path.write_text(caption(number))
        path.with_suffix(".json").write_text(json.dumps({"caption": [caption(number), caption(number, 1)]}))
        if number % 2:
            path.unlink()
    return [path for path in folder.iterdir() if path.is_file()]


def tar(folder: Path) -> list[Path]:
    with tarfile.open(folder / "a.tar", "w") as archive:
        for number, data in enumerate(IMAGES):
            texts = {"txt": caption(number).encode()}
            if number % 2:
                texts = {"json": json.dumps({"captions": [caption(number), caption(number, 1)]}).encode()}
            for suffix, content in {"jpg": data, **texts, "cls": b"3"}.items():
                member = tarfile.TarInfo(f"{name(number)}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return [folder / "a.tar"]


def tar_gz(folder: Path) -> list[Path]:
    (path,) = tar(folder)
    with tarfile.open(path) as archive, tarfile.open(folder / "a.tar.gz", "w:gz", compresslevel=1) as compressed:
        for member in archive:
            compressed.addfile(member, archive.extractfile(member))
    path.unlink()
    return [folder / "a.tar.gz"]


def table_rows() -> list[dict]:
    return [
        {"image": f"{name(number)}.jpg", "caption": caption(number, variant), "image_id": number}
        for variant in range(2)
        for number in range(COUNT)
    ]


def lavis(folder: Path) -> list[Path]:
    pictures(folder)
    (folder / "list.json").write_text(json.dumps(table_rows()))
    return [folder / "list.json"]


def questions(folder: Path) -> list[Path]:
    pictures(folder)
    rows = [{**row, "question": "what?", "answer": [row.pop("caption")] * 2} for row in table_rows()]
    (folder / "list.json").write_text(json.dumps(rows))
    return [folder / "list.json"]


def coco(folder: Path) -> list[Path]:
    pictures(folder)
    images = [{"id": zlib.crc32(name(n).encode()), "file_name": f"{name(n)}.jpg"} for n in range(COUNT)]
    annotations = [
        {"id": n, "image_id": images[n]["id"], "caption": caption(n, k)} for k in range(2) for n in range(COUNT)
    ]
    (folder / "list.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return [folder / "list.json"]


def jsonl(folder: Path) -> list[Path]:
    pictures(folder)
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table_rows()))
    return [folder / "captions.jsonl"]


def csv_table(folder: Path) -> list[Path]:
    pictures(folder)
    with (folder / "list.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "caption", "image_id"])
        writer.writeheader()
        writer.writerows(table_rows())
    return [folder / "list.csv"]


def parquet_bytes(folder: Path) -> list[Path]:
    images = [{"bytes": data, "path": f"{name(number)}.jpg"} for number, data in enumerate(IMAGES)]
    table = pa.table({"image": images, "caption": [[caption(n), caption(n, 1)] for n in range(COUNT)]})
    pq.write_table(table, folder / "a.parquet", row_group_size=2, write_page_checksum=True)
    return [folder / "a.parquet"]


def parquet_paths(folder: Path) -> list[Path]:
    pictures(folder)
    pq.write_table(pa.Table.from_pylist(table_rows()), folder / "a.parquet", write_page_checksum=True)
    return [folder / "a.parquet"]


def videos(folder: Path) -> list[Path]:
    preparing.write_videos(folder, 2)
    return list(folder.iterdir())


# Writer of the source, and number of mutated ones.
SOURCES: dict[Callable[[Path], list[Path]], int] = {
    files: 400,
    tar: 400,
    tar_gz: 150,
    lavis: 200,
    questions: 100,
    coco: 200,
    jsonl: 250,
    csv_table: 250,
    parquet_bytes: 150,
    parquet_paths: 100,
    videos: 50,
}


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Flips, inserts, deletes or cuts. Deletions are short, since longer ones may join the parts of two rows."""
    data = bytearray(data)
    kind = rng.integers(5)
    if kind == 0 or not data:
        return bytes(data[: int(rng.integers(len(data) + 1))])
    for _ in range(int(rng.integers(1, 5))):
        place = int(rng.integers(len(data) or 1))
        if kind == 1:
            data[place : place + 1] = bytes([data[place] ^ 1 << int(rng.integers(8))]) if data else b""
        elif kind == 2:
            del data[place : place + int(rng.integers(1, 5))]
        elif kind == 3:
            data[place:place] = rng.bytes(int(rng.integers(1, 20)))
        else:
            data[place : place + int(rng.integers(1, 5))] = rng.choice([b"\0", b"\xff", b'"', b"\n", b"\xed\xa0\x80"])
    return bytes(data)


def odd(content: object, rng: np.random.Generator) -> object:
    """Replaces a random value in JSON by an odd one, or drops it."""
    if isinstance(content, list | dict) and content and rng.random() < 0.9:
        keys = list(content) if isinstance(content, dict) else range(len(content))
        key = keys[int(rng.integers(len(keys)))]
        if rng.random() < 0.1:
            del content[key]
        else:
            content[key] = odd(content[key], rng)
        return content
    return ODD[int(rng.integers(len(ODD)))]


def mutated(path: Path, data: bytes, rng: np.random.Generator) -> bytes:
    if path.suffix == ".json" and rng.random() < 0.5:
        return json.dumps(odd(json.loads(data), rng)).encode()
    if path.suffix == ".jsonl" and rng.random() < 0.5:
        lines = data.splitlines()
        place = int(rng.integers(len(lines)))
        lines[place] = json.dumps(odd(json.loads(lines[place]), rng)).encode()
        return b"\n".join(lines)
    return damaged(data, rng)


def prepared(source: Path, output: Path, kind: str) -> Iterator[tuple[bytes, list[str]]]:
    """Plans and prepares every shard as `prepare` does; yields the media and texts of the records."""
    output.mkdir()
    staging = Staging(str(output), "train")
    staging.folder.mkdir()
    reader = choose([str(source)], kind)[1]
    plan = reader.plan([str(source)], Options())
    listing.spool(plan, staging.examples)
    job = Job(str(output), "train", "o", len(plan.shards), plan.media, plan.questions, 0, False)
    for number, shard in enumerate(plan.shards):
        prepare_shard(job, number, shard)
        index = Index(staging.index(number))
        file = output / f"o-train.array_record-{number:05d}-of-{job.count:05d}"
        reader = array_record_module.ArrayRecordReader(str(file))
        assert reader.num_records() == len(index)
        for row, record in zip(index, reader.read_all() if len(index) else [], strict=True):
            example = tf_example_pb2.Example.FromString(record).features.feature
            assert example["id"].bytes_list.value[0].decode() == row.id
            yield example[plan.media].bytes_list.value[0], row.texts


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    def fail(*_) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(PATIENCE_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


KINDS = {files: "files", tar: "webdataset", tar_gz: "webdataset", videos: "video"}
KINDS |= dict.fromkeys((lavis, questions, coco), "lavis")
KINDS |= dict.fromkeys((jsonl, csv_table, parquet_bytes, parquet_paths), "table")


def test_there_are_enough():
    assert sum(SOURCES.values()) >= 2000


@pytest.mark.parametrize("write", SOURCES, ids=lambda write: write.__name__)
def test_damaged_sources(tmp_path, write):
    source, output = tmp_path / "data", tmp_path / "o"
    source.mkdir()
    targets = sorted(write(source))
    whole = {path: path.read_bytes() for path in targets}
    rng = np.random.default_rng([SEED, list(SOURCES).index(write)])
    numbers = {data: number for number, data in enumerate(IMAGES)}
    outcomes = collections.Counter()
    for trial in range(SOURCES[write] + 1):
        path = targets[int(rng.integers(len(targets)))]
        if trial:  # the first one is whole
            path.write_bytes(mutated(path, whole[path], rng))
        count = 0
        try:
            with no_hang():
                for media, texts in prepared(source, output, KINDS[write]):
                    count += 1
                    if media in numbers:
                        found = {number_of(text) for text in texts} - {None}
                        assert found <= {numbers[media]}, (trial, texts)
        except UserError:
            outcomes["refused"] += 1
        if write is files:
            assert count >= COUNT - 1  # the others are not affected
        expected = {videos: 2, questions: 2 * COUNT}.get(write, COUNT)
        assert trial or count == expected
        outcomes["whole" if count >= expected else "partly" if count else "none"] += 1
        path.write_bytes(whole[path])
        shutil.rmtree(output, ignore_errors=True)
    print(write.__name__, dict(outcomes))
    assert outcomes["whole"] and sum(outcomes.values()) > outcomes["whole"]
