"""Preparing from start to finish: what is written, going on after interruptions, and refusals."""

import errno
import os
import shlex
import zlib
from pathlib import Path

import numpy as np
import preparing
import pytest
import tensorflow_datasets as tfds
import verbs
from ml_collections import ConfigDict
from PIL import Image
from preparing import (
    caption,
    contents,
    picture,
    records,
    rows,
    run,
    skipped,
    write_files,
    write_jsonl,
    write_lavis,
    write_parquet,
    write_tars,
)

from simvlg_jax import prepare as verb
from simvlg_jax.data import transforms
from simvlg_jax.data.index import Index
from simvlg_jax.data.preparing import local, shard
from simvlg_jax.data.preparing.staging import locked
from simvlg_jax.data.sources import load_source
from simvlg_jax.utils.errors import TRY_AGAIN, UserError

KINDS = {
    "palette": ("PNG", "P"),
    "gif": ("GIF", "P"),
    "cmyk": ("JPEG", "CMYK"),
    "grey": ("JPEG", "L"),
    "16-bit": ("PNG", "I;16"),
    "alpha": ("PNG", "RGBA"),
    "bits": ("PNG", "1"),
    "webp": ("WEBP", "RGB"),
    "tiff": ("TIFF", "RGB"),
}


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def test_tfds_opens_every_kind_of_picture_by_default(tmp_path):
    folder = tmp_path / "My Pictures-2"
    folder.mkdir()
    strip = picture(1, size=(1, 5000))
    turned = picture(
        2, "JPEG", size=(24, 12), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    )
    animated = picture(3, "GIF", save_all=True, append_images=[Image.new("RGB", (16, 12), "red")])
    kinds = {name: picture(0, *kind) for name, kind in KINDS.items()}
    kinds |= {"strip": strip, "turned": turned, "animated": animated}
    for name, data in kinds.items():
        (folder / f"{name}.png").write_bytes(data)
        (folder / f"{name}.txt").write_text(name)
    output = tmp_path / "1 My output"
    run(output, folder)
    assert {record["captions"][0].decode(): record["image"] for record in records(output)} == kinds
    builder = tfds.builder_from_directory(output)
    assert builder.name == "data_1_my_output"
    decoded = {record["captions"][0].decode(): record["image"] for record in builder.as_data_source("train")}
    for name, pixels in decoded.items():
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[:2] in {(12, 16), (5000, 1), (12, 24)}, (
            name
        )
    config = ConfigDict({"name": "prepared", "path": str(output), "clean": ""})
    read = {record["caption"]: transforms.decode(record["image"]).size for record in load_source(config, "train")}
    assert read == dict.fromkeys(KINDS, (16, 12)) | {"strip": (1, 5000), "turned": (12, 24), "animated": (16, 12)}


def test_faults_of_pictures(tmp_path):
    source = write_files(tmp_path / "data", 2)
    jpeg = picture(5, "JPEG", size=(200, 200))
    bomb = picture(0)
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + bomb[24:29]
    bomb = bomb[:12] + header + zlib.crc32(header).to_bytes(4, "big") + bomb[33:]
    faults = {
        "bomb": bomb,
        "empty": b"",
        "half": jpeg[: len(jpeg) // 2],
        "text": b"hello, I am no picture",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    }
    for name, data in faults.items():
        (source / f"{name}.jpg").write_bytes(data)
        (source / f"{name}.txt").write_text("x")
    summary = run(tmp_path / "o", source)
    assert (summary.written, summary.read) == (2, 7)
    found = dict(skipped(tmp_path / "o"))
    assert found == {
        "bomb.jpg": "too large",
        "empty.jpg": "empty file",
        "half.jpg": "truncated",
        "text.jpg": "not a picture",
        "svg.jpg": "not a picture",
    }


def test_large_pictures_are_made_smaller_and_others_kept(tmp_path):
    source = tmp_path / "data"
    source.mkdir()
    given = {"small": (40, 64), "large": (200, 100), "strip": (1, 5000)}
    for name, size in given.items():
        (source / f"{name}.png").write_bytes(picture(7, size=size))
        (source / f"{name}.txt").write_text(caption(7))
    run(tmp_path / "o", source, max_side=64)
    found = {record["id"].decode(): record["image"] for record in records(tmp_path / "o")}
    assert found["small.png"] == (source / "small.png").read_bytes()
    sizes = {name: transforms.decode(image).size for name, image in found.items()}
    assert sizes == {"small.png": (40, 64), "large.png": (64, 32), "strip.png": (1, 64)}
    preparing.assert_own_captions(found["large.png"], [caption(7)])


def test_splits_share_a_folder(tmp_path):
    run(tmp_path / "o", write_files(tmp_path / "a", 3))
    before = times(tmp_path / "o")
    run(tmp_path / "o", write_files(tmp_path / "b", 2), split="val")
    assert len(records(tmp_path / "o")) == 3 and len(records(tmp_path / "o", "val")) == 2
    after = times(tmp_path / "o")
    kept = [name for name in before if "train" in name]
    assert len(kept) == 4 and all(before[name] == after[name] for name in kept)
    os.rename(tmp_path / "o", tmp_path / "renamed")
    run(tmp_path / "renamed", write_files(tmp_path / "c", 1), split="test")
    assert len(records(tmp_path / "renamed", "test")) == 1 and len(records(tmp_path / "renamed")) == 3
    question = preparing.write_json(tmp_path / "q", [{"image": "0.png", "question": "a?", "answer": "b"}], 1)
    with pytest.raises(UserError, match="other features"):
        run(tmp_path / "renamed", question, split="more")


@pytest.mark.parametrize("index_only", [False, True])
def test_finished_and_run_again_changes_nothing(tmp_path, index_only):
    source = write_tars(tmp_path / "data", 3)
    first = run(tmp_path / "o", source, index_only=index_only)
    before = times(tmp_path / "o")
    again = run(tmp_path / "o", source, index_only=index_only)
    assert times(tmp_path / "o") == before
    assert again.seconds is None and (again.written, again.skipped) == (first.written, first.skipped)
    (source / "00000.tar").touch()
    for options in ({}, {"index_only": not index_only}):
        with pytest.raises(UserError, match='already holds the split "train"'):
            run(tmp_path / "o", source, **{"index_only": index_only, **options})
    assert times(tmp_path / "o") == before


def damaged_tars(folder: Path) -> Path:
    """Three tars with faults; all of the second is skipped, and the third breaks off."""
    write_tars(folder, 6, tars=3)
    path = folder / "00001.tar"
    path.write_bytes(path.read_bytes().replace(b"JFIF", b"\0\0\0\0").replace(b"\xff\xd8\xff", b"\0\0\0"))
    path = folder / "00002.tar"
    path.write_bytes(path.read_bytes()[:-14_000])
    return folder


def test_an_index_of_tars_has_the_rows_of_the_copy(tmp_path):
    source = damaged_tars(tmp_path / "data")
    run(tmp_path / "copy", source)
    run(tmp_path / "index", source, index_only=True)
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [
        *("index-train.arrow", "prepared-train.json", "skipped-train.jsonl")
    ]
    assert rows(tmp_path / "index") == rows(tmp_path / "copy")
    assert skipped(tmp_path / "index") == skipped(tmp_path / "copy")
    assert [tar.path for tar in Index(tmp_path / "index" / "index-train.arrow").tars] == [
        str(source / f"{n:05d}.tar") for n in range(3)
    ]
    both = []
    for name in ("copy", "index"):
        config = ConfigDict({"name": "prepared", "path": str(tmp_path / name), "clean": ""})
        both.append(list(load_source(config, "train")))
    assert both[0] == both[1] and len(both[0]) > 6


def test_shards_without_records_are_no_trouble(tmp_path):
    source = damaged_tars(tmp_path / "data")
    run(tmp_path / "o", source)
    builder = tfds.builder_from_directory(tmp_path / "o")
    lengths = builder.info.splits["train"].shard_lengths
    assert lengths[0] == 6 and lengths[1] == 0 and 0 < lengths[2] < 6
    assert [record["id"].decode() for record in builder.as_data_source("train")] == [n for n, _ in rows(tmp_path / "o")]


@pytest.mark.parametrize("write", [write_files, write_lavis, write_tars, write_parquet])
def test_a_run_that_failed_goes_on(tmp_path, monkeypatch, small_shards, write):
    source = write(tmp_path / "data", *((4, 4) if write is write_tars else (20,)))
    run(tmp_path / "whole", source)
    calls = []

    original = shard.prepare_shard

    def prepare_shard(job, number, *rest):
        calls.append(number)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "disk")
        return original(job, number, *rest)

    monkeypatch.setattr(local, "prepare_shard", prepare_shard)
    output = tmp_path / "o" / "whole"
    with pytest.raises(OSError, match="No space"):
        run(output, source)
    assert not (output / "dataset_info.json").exists()
    run(output, source)
    assert calls == [0, 1, 2, 2, *range(3, max(calls) + 1)]
    whole = contents(tmp_path / "whole")
    assert contents(output) == whole


def test_another_source_does_not_go_on(tmp_path, monkeypatch, small_shards):
    source = write_files(tmp_path / "data", 8)
    monkeypatch.setattr(local, "prepare_shard", lambda *_: (_ for _ in ()).throw(UserError("stopped")))
    with pytest.raises(UserError, match="stopped"):
        run(tmp_path / "o", source)
    monkeypatch.undo()
    for options in ({"max_side": 8}, {}):
        if not options:
            (source / "00000" / "000000003.txt").write_text("changed meanwhile")
        with pytest.raises(UserError, match=r"have changed since: delete .*\.prepare-train"):
            run(tmp_path / "o", source, **options)


def test_nothing_readable_leaves_nothing(tmp_path):
    source = write_files(tmp_path / "data", 2)
    for path in source.rglob("*.jpg"):
        path.write_bytes(b"x")
    with pytest.raises(UserError, match=r"nothing in .* can be used: .*not a picture 2\), for example"):
        run(tmp_path / "o", source)
    assert not (tmp_path / "o").exists()


def test_missing_pictures_point_to_images(tmp_path):
    source = write_jsonl(tmp_path / "data", 2)
    moved = source.rename(tmp_path / source.name)
    with pytest.raises(UserError, match=r"missing file 2.*--images"):
        run(tmp_path / "o", moved)
    run(tmp_path / "o", moved, images=str(tmp_path / "data"))
    assert len(records(tmp_path / "o")) == 2


def test_a_pattern_of_tars_most_of_which_are_absent_is_explained(tmp_path):
    write_tars(tmp_path / "tars", 1)
    with pytest.raises(UserError, match=r"missing file 3\).*give --source a pattern of the tars that exist\n"):
        run(tmp_path / "o", str(tmp_path / "tars" / "{00000..00003}.tar"), max_skipped=0.5)


def test_too_much_skipped_fails_and_keeps_the_work(tmp_path, monkeypatch):
    source = write_files(tmp_path / "data", 4)
    for number in range(3):
        (source / "00000" / f"{number:09d}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"75.0 % were skipped.*empty file 3"):
        run(tmp_path / "o", source, max_skipped=0.5)
    assert not (tmp_path / "o" / "dataset_info.json").exists()
    monkeypatch.setattr(local, "prepare_shard", None)  # nothing is done again
    run(tmp_path / "o", source, max_skipped=0.8)
    assert len(records(tmp_path / "o")) == 1


def test_two_at_once_are_refused(tmp_path):
    source = write_files(tmp_path / "data", 1)
    with locked(str(tmp_path / "o")), pytest.raises(UserError, match="another process") as refusal:
        run(tmp_path / "o", source)
    assert refusal.value.status == TRY_AGAIN
    run(tmp_path / "o", source)


def test_outputs_that_cannot_be_written(tmp_path):
    source = write_files(tmp_path / "data", 1)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write to"):
        run(tmp_path / "file", source)
    with pytest.raises(UserError, match="cannot write to"):
        run(tmp_path / "file" / "o", source)
    with pytest.raises(UserError, match="lies in the source"):
        run(source / "o", source)


def test_records_that_cannot_be_written_are_reported(tmp_path, monkeypatch):
    source = write_files(tmp_path / "data", 1)
    monkeypatch.setattr(shard.records.array_record_module, "ArrayRecordWriter", lambda *_: open("/dev/full/x"))  # noqa: SIM115
    with pytest.raises(UserError, match="make room or choose another --output"):
        run(tmp_path / "o", source)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--source", "data"], 2, "--source needs --output"),
        (["--output", "o"], 2, "--output needs --source"),
        (["--source", "data", "--output", "o", "--split", "a/b"], 2, "--split 'a/b'"),
        (["--source", "data", "--output", "o", "--data_dir", "x"], 2, "--data_dir is for the example"),
        (["--source", "data", "--output", "o", "--index_only", "--max_side", "9"], 2, "--max_side writes new pictures"),
        (["--source", "data", "--output", "o", "--beam_options", "x"], 2, "--beam_options needs --engine beam"),
        (["--source", "data", "--output", "o", "--max_skipped", "2"], 2, "--max_skipped is a share"),
        (["--source", "data", "--output", "o", "--index_only"], 2, "--index_only is for WebDataset tars"),
        (["--source", "nowhere", "--output", "o"], 1, "there is no nowhere"),
        (["--source", "data", "--output", "o", "--workers", "1"], 0, "train: read 2, written 2, skipped 0"),
    ],
)
def test_the_command(tmp_path, monkeypatch, capsys, arguments, status, message):
    write_files(tmp_path / "data", 2)
    monkeypatch.chdir(tmp_path)
    assert verbs.call(verb, *arguments) == status
    said = capsys.readouterr()
    assert message in said.out + said.err
    assert "Traceback" not in said.err
    assert (tmp_path / "o").exists() == (status == 0)


def test_the_command_of_the_documentation():
    """The commands of docs/data.md are understood."""
    text = (Path(__file__).parent.parent / "docs" / "data.md").read_text().replace("\\\n", " ")
    commands = [line.strip() for line in text.splitlines() if "simvlg_jax.data.prepare --source" in line]
    assert len(commands) >= 6
    for command in commands:
        verb.check(verb.parse(shlex.split(command.split("simvlg_jax.data.prepare")[1])))
