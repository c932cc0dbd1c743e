"""What each format is read as: ids, captions, splits, and the reasons why records are skipped."""

import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict
from preparing import (
    assert_own_captions,
    caption,
    picture,
    records,
    rows,
    run,
    skipped,
    write_csv,
    write_files,
    write_json,
    write_jsonl,
    write_lavis,
    write_parquet,
    write_pictures,
    write_tars,
    write_videos,
)

from simvlg_jax.data.extras import Extras
from simvlg_jax.data.index import Tar
from simvlg_jax.data.preparing import media
from simvlg_jax.data.readers import READERS, choose, paths, resolve
from simvlg_jax.data.readers.webdataset import TarShard
from simvlg_jax.data.sources import load_source
from simvlg_jax.utils.errors import UserError

FORMATS = {
    "files": write_files,
    "webdataset": write_tars,
    "lavis": write_lavis,
    "table": write_jsonl,
    "video": write_videos,
}


def captions(count: int) -> list[list[str]]:
    return [[caption(number)] for number in range(count)]


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_recognised(tmp_path, name):
    assert set(FORMATS) == set(READERS)
    source = FORMATS[name](tmp_path / "data", 3)
    assert choose(resolve([str(source)]), "auto")[0] == name


@pytest.mark.parametrize("write", [write_files, write_tars, write_lavis, write_jsonl, write_csv, write_parquet])
def test_pictures_have_their_own_captions(tmp_path, write):
    source = write(tmp_path / "data", 10)
    for name, given in (("o", source), ("folder", tmp_path / "data")):
        run(tmp_path / name, given)
        found = records(tmp_path / name)
        assert len(found) == 10 and not skipped(tmp_path / name)
        for number, record in enumerate(found):
            texts = [text.decode() for text in record["captions"]]
            assert texts[0] == caption(number)
            assert_own_captions(record["image"], texts)


@pytest.mark.parametrize("decoded", [True, False])
def test_videos_keep_their_bytes(tmp_path, monkeypatch, decoded):
    source = write_videos(tmp_path / "data", 3)
    (source / "no.mov").write_bytes(b"no video at all")
    (source / "broken.webm").write_bytes(b"\x1a\x45\xdf\xa3 and no more")
    (source / "empty.avi").write_bytes(b"")
    for name in ("no", "broken", "empty"):
        (source / f"{name}.txt").write_text("x")
    if not decoded:  # without the package, only the first bytes are looked at
        monkeypatch.setattr(media.importlib.util, "find_spec", lambda name: None)
    run(tmp_path / "o", source)
    found = records(tmp_path / "o")
    assert [record["video"] for record in found][:3] == [(source / f"{n}.mp4").read_bytes() for n in range(3)]
    reasons = [("broken.webm", "truncated"), ("empty.avi", "empty file"), ("no.mov", "not a video")]
    assert skipped(tmp_path / "o") == reasons[0 if decoded else 1 :]


def test_files_of_img2dataset(tmp_path):
    source = write_files(tmp_path / "data", 3)
    for number in range(3):
        content = {"caption": "another", "url": "http://x", "key": f"{number:09d}", "status": "success"}
        (source / "00000" / f"{number:09d}.json").write_text(json.dumps(content))
    failed = {"caption": "gone", "url": "http://x", "status": "failed_to_download"}
    (source / "00000" / "000000003.json").write_text(json.dumps(failed))
    (source / "00000_stats.json").write_text(json.dumps({"count": 4}))
    pq.write_table(pa.table({"url": ["http://x"]}), source / "00000.parquet")
    run(tmp_path / "o", source)
    assert rows(tmp_path / "o") == [(f"00000/{n:09d}.jpg", [caption(n)]) for n in range(3)]
    assert skipped(tmp_path / "o") == [("000000003.json", "no picture")]


def test_json_beside_a_picture(tmp_path):
    names = write_pictures(tmp_path / "data", 3)
    for number, name in enumerate(names):
        content = {"captions": [caption(number), " ", caption(number, 1)]} if number else {"caption": None}
        (tmp_path / "data" / name).with_suffix(".json").write_text(json.dumps(content))
    run(tmp_path / "o", tmp_path / "data")
    assert rows(tmp_path / "o") == [(f"{n}.png", [caption(n), caption(n, 1)]) for n in (1, 2)]
    assert skipped(tmp_path / "o") == [("0.png", "no caption"), ("1.png", "caption empty"), ("2.png", "caption empty")]


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
@pytest.mark.parametrize("text", ["txt", "json"])
def test_tars_of_the_webdataset_package(tmp_path, kind, text):
    source = write_tars(tmp_path / "data", 3, tars=2, text=text, kind=kind)
    run(tmp_path / "o", f"{source}/{{00000..00001}}.tar")
    assert rows(tmp_path / "o") == [(f"{n // 3:05d}/{n:05d}", [caption(n)]) for n in range(6)]


def test_tars_of_videos(tmp_path):
    """As video2dataset writes them, with a thumbnail; the copy and the tars in place give the same."""
    videos = [(write_videos(tmp_path / "clips", 4) / f"{n}.mp4").read_bytes() for n in range(4)]
    about = [{"reverse_caption": "falls", "group": "up"}, {"caption": caption(1), "reverse_caption": "falls"}, [], {}]
    about[3] = {"reverse_caption": 3}
    members = [("stats.json", b"{}")]
    for n, (video, content) in enumerate(zip(videos, about, strict=True)):
        texts = [] if n == 1 else [(f"{n}.txt", caption(n).encode())]
        members += [(f"{n}.jpg", picture(n)), *texts, (f"{n}.json", json.dumps(content).encode()), (f"{n}.mp4", video)]
    members += [("4.jpg", picture(4)), ("4.txt", b"no video")]
    tar_of(tmp_path / "t.tar", members)
    extras = [Extras("up", reverse_caption="falls"), Extras(reverse_caption="falls"), Extras()]
    for name in ("copy", "index"):
        run(tmp_path / name, tmp_path / "t.tar", index_only=name == "index")
        assert [why for _, why in skipped(tmp_path / name)] == ["no picture", "wrong type", "no picture"]
        source = load_source(ConfigDict({"name": "prepared", "path": str(tmp_path / name), "frames": 2}), "train")
        assert [source.info(n).extras for n in range(3)] == extras
        assert [(source[n]["image"], source[n]["caption"]) for n in range(3)] == [
            (videos[n], caption(n)) for n in range(3)
        ]


def test_what_tars_hold_does_not_change_the_fingerprints_of_data_that_were_prepared_before_there_were_videos():
    shard = TarShard(Tar("a.tar", 1), "1 2", "a", "video")
    assert repr(shard) == "TarShard(tar=Tar(path='a.tar', size=1), stamp='1 2', prefix='a')"


def test_a_broken_first_tar_does_not_say_what_the_others_hold(tmp_path):
    video = (write_videos(tmp_path / "clips", 1) / "0.mp4").read_bytes()
    (tmp_path / "0.tar").write_bytes(b"no tar")
    tar_of(tmp_path / "1.tar", [("0.mp4", video), ("0.txt", caption(0).encode())])
    run(tmp_path / "o", f"{tmp_path}/{{0..2}}.tar")
    assert rows(tmp_path / "o") == [("1/0", [caption(0)])]
    assert skipped(tmp_path / "o") == [("0.tar", "truncated tar"), ("2.tar", "missing file")]


def test_tars_of_one_name_have_ids_of_their_own(tmp_path):
    for name in "ab":
        write_tars(tmp_path / "data" / name, 2)
    run(tmp_path / "o", tmp_path / "data")
    assert [name for name, _ in rows(tmp_path / "o")] == [f"00000{part}/{n:05d}" for part in ("", "~2") for n in (0, 1)]


def tar_of(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_samples_of_a_tar_never_mix(tmp_path):
    members = [
        *(("0.jpg", picture(0)), ("0.txt", caption(0).encode())),
        *(("a/1.PNG", picture(1)), ("a/1.json", json.dumps({"captions": [caption(1), caption(1, 1)]}).encode())),
        ("2.jpg", picture(2)),  # without caption
        ("3.txt", caption(3).encode()),  # without picture
        *(("0.jpg", picture(4)), ("0.txt", caption(4).encode())),  # again
        *(("5.jpg", picture(5)), ("5.jpg", picture(6)), ("5.txt", caption(6).encode())),
        *(("6.x.jpg", picture(6)), ("6.txt", caption(6).encode())),  # another suffix
        *(("._7.jpg", b"x"), ("7.jpg", b""), ("7.txt", b"x")),
        *(("8.jpg", picture(8)), ("8.txt", b"\xff\xfe")),
    ]
    run(tmp_path / "o", tar_of(tmp_path / "t.tar", members))
    assert rows(tmp_path / "o") == [("t/0", [caption(0)]), ("t/a/1", [caption(1), caption(1, 1)])]
    reasons = [(where.split(", ")[1], reason) for where, reason in skipped(tmp_path / "o")]
    assert reasons == [
        *(("2", "no caption"), ("3", "no picture"), ("0", "duplicate key")),
        *(("5", "no caption"), ("5", "duplicate key")),
        *(("6", "no picture"), ("7", "empty file"), ("8", "caption not UTF-8")),
    ]


def test_samples_before_the_break_of_a_tar_count(tmp_path):
    whole = (write_tars(tmp_path / "data", 5) / "00000.tar").read_bytes()
    found = []
    for size in range(0, len(whole), 256):
        (tmp_path / "t.tar").write_bytes(whole[:size])
        output = tmp_path / str(size)
        try:
            run(output, tmp_path / "t.tar")
        except UserError as error:
            assert "nothing" in str(error)
            found.append(0)
            continue
        found.append(len(rows(output)))
        assert rows(output) == [(f"t/{n:05d}", [caption(n)]) for n in range(found[-1])]
    assert found == sorted(found) and found[-1] == 5 and set(found) == {0, 1, 2, 3, 4, 5}


def test_a_damaged_header_in_a_tar_is_no_end(tmp_path):
    path = write_tars(tmp_path / "data", 4) / "00000.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        offset = tar.getmember("00002.jpg").offset
    data[offset + 20] ^= 1
    path.write_bytes(data)
    run(tmp_path / "o", path)
    assert [texts for _, texts in rows(tmp_path / "o")] == captions(2)
    assert skipped(tmp_path / "o") == [("00000.tar", "damaged tar")]


def test_compressed_tars(tmp_path):
    members = [("0.png", picture(0)), ("0.txt", caption(0).encode())]
    source = tar_of(tmp_path / "t.tar.gz", members, "w:gz")
    run(tmp_path / "o", source)
    assert rows(tmp_path / "o") == [("t/0", [caption(0)])]
    with pytest.raises(UserError, match=r"compressed.*--index_only"):
        run(tmp_path / "p", source, index_only=True)


def test_absent_tars_of_a_pattern_are_skipped(tmp_path):
    source = write_tars(tmp_path / "data", 1, tars=2)
    run(tmp_path / "o", f"{source}/{{00000..00003}}.tar")
    assert len(rows(tmp_path / "o")) == 2
    assert skipped(tmp_path / "o") == [("00002.tar", "missing file"), ("00003.tar", "missing file")]


def test_lists_of_lavis(tmp_path):
    content = [
        {"image": "0.png", "caption": [caption(0), caption(0, 1)], "image_id": 7},
        {"image": "./1.png", "caption": caption(1), "image_id": 8},
        {"image": "1.png", "caption": caption(1, 1), "image_id": 8},
        {"image": "2.png", "img_id": 9},  # of NoCaps
        {"image": "gone.png", "caption": "x", "image_id": 10},
        *("x", 3, None, {"image": 3, "caption": "x"}, {"image": "0.png", "caption": {"x": 1}}),
    ]
    run(tmp_path / "o", write_json(tmp_path / "data", content, 3))
    assert rows(tmp_path / "o") == [("7", [caption(0), caption(0, 1)]), ("8", [caption(1), caption(1, 1)])]
    reasons = [reason for _, reason in skipped(tmp_path / "o")]
    assert reasons == ["no caption", "missing file", *["wrong type"] * 5]


def test_nocaps_alone_has_nothing_to_prepare(tmp_path):
    source = write_json(tmp_path / "data", [{"image": "0.png", "img_id": 0}], 1)
    with pytest.raises(UserError, match="no caption 1"):
        run(tmp_path / "o", source)
    assert not (tmp_path / "o").exists()


def test_coco_captions(tmp_path):
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "coco_url": "http://x"} for n in (2, 0, 1)],
        "annotations": [{"id": 10 + k, "image_id": n, "caption": caption(n, k)} for k, n in enumerate((0, 2, 0, 5))],
    }
    run(tmp_path / "o", write_json(tmp_path / "data", content, 3))
    assert rows(tmp_path / "o") == [("2", [caption(2, 1)]), ("0", [caption(0), caption(0, 2)])]
    assert [reason for _, reason in skipped(tmp_path / "o")] == ["no caption", "no picture"]


def test_splits_of_karpathy(tmp_path):
    write_pictures(tmp_path / "data" / "val2014", 4)
    images = [
        {"filepath": "val2014", "filename": f"{n}.png", "cocoid": n, "split": split, "sentences": [{"raw": caption(n)}]}
        for n, split in enumerate(("train", "val", "restval", "test"))
    ]
    source = write_json(tmp_path / "json", {"images": images, "dataset": "coco"})
    for split, numbers in (("train", (0, 2)), ("val", (1,)), ("test", (3,))):
        run(tmp_path / "o", source, split=split, images=str(tmp_path / "data"))
        assert rows(tmp_path / "o", split) == [(str(n), [caption(n)]) for n in numbers]
        assert len(records(tmp_path / "o", split)) == len(numbers)


@pytest.mark.parametrize("with_ids", [True, False])
def test_questions(tmp_path, with_ids):
    content = [
        {"question": "what?", "image": "0.png", "answer": ["cat", "cat", "dog"]},
        {"question": "where?", "image": "0.png", "answer": "here"},
        {"question": "why?", "image": "1.png", "direct_answers": [{"answer": "so"}]},
        {"question": "who?", "image": "1.png"},
        {"question": " ", "image": "1.png", "answer": "x"},
        {"image": "1.png", "caption": "no question"},
    ]
    if with_ids:
        content = [row | {"question_id": 100 + number, "image_id": 1} for number, row in enumerate(content)]
    run(tmp_path / "o", write_json(tmp_path / "data", content, 2))
    ids = ["100", "101", "102"] if with_ids else ["0.png#1", "0.png#2", "1.png#1"]
    assert rows(tmp_path / "o") == list(zip(ids, [["cat", "cat", "dog"], ["here"], ["so"]], strict=True))
    assert [record["question"] for record in records(tmp_path / "o")] == [b"what?", b"where?", b"why?"]
    assert [reason for _, reason in skipped(tmp_path / "o")] == ["no answer", "question empty", "no question"]


@pytest.mark.parametrize("key", ["video", "image"])
def test_lists_of_videos(tmp_path, key):
    write_videos(tmp_path / "data", 2)
    content = [{key: f"{n}.mp4", "caption": caption(n, k), "image_id": n} for n in range(2) for k in range(2)]
    run(tmp_path / "o", write_json(tmp_path / "data", content))
    assert rows(tmp_path / "o") == [(str(n), [caption(n), caption(n, 1)]) for n in range(2)]
    assert "video" in records(tmp_path / "o")[0]


@pytest.mark.parametrize(
    ("header", "delimiter"), [("image,caption", ","), ("file_name;text", ";"), ("path\tcaption", "\t")]
)
def test_csv(tmp_path, header, delimiter):
    write_pictures(tmp_path / "data", 4)
    lines = [header, *(f'{n}.png{delimiter}"{caption(n)}\nsecond ""line"""' for n in range(2))]
    lines += [f'2.png{delimiter}"[""one"", ""two""]"', f"3.png{delimiter}a{delimiter}b{delimiter}c"]
    name = "list.tsv" if delimiter == "\t" else "list.csv"
    (tmp_path / "data" / name).write_bytes("\ufeff".encode() + "\n".join(lines).encode() + b"\n0.png," + b"\xff\n")
    run(tmp_path / "o", tmp_path / "data" / name)
    assert rows(tmp_path / "o") == [
        *((f"{n}.png", [f'{caption(n)}\nsecond "line"']) for n in range(2)),
        ("2.png", ["one", "two"]),
    ]
    assert [reason for _, reason in skipped(tmp_path / "o")] == ["too many columns", "not UTF-8"]


def test_imagefolder(tmp_path):
    for split in ("train", "test"):
        write_jsonl(tmp_path / "data" / split, 3, "metadata.jsonl")
        text = (tmp_path / "data" / split / "metadata.jsonl").read_text().replace('"image"', '"file_name"')
        (tmp_path / "data" / split / "metadata.jsonl").write_text(text.replace('"caption"', '"text"'))
        run(tmp_path / "o", tmp_path / "data", split=split)
    assert [texts for _, texts in rows(tmp_path / "o", "test")] == captions(3)
    with pytest.raises(UserError, match='no table of the split "val"'):
        run(tmp_path / "o", tmp_path / "data", split="val")


def test_our_own_list_keeps_its_splits(tmp_path):
    names = write_pictures(tmp_path / "data", 12)
    lines = [
        {"image": name, "caption": caption(n)} | ({"split": "val"} if n < 3 else {}) for n, name in enumerate(names)
    ]
    lines.append({"image": "./1.png", "caption": caption(1, 1)})
    (tmp_path / "data" / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    seen = {}
    for split in ("train", "validation"):
        run(tmp_path / "o", tmp_path / "data", split=split)
        seen |= dict(rows(tmp_path / "o", split))
    assert dict(rows(tmp_path / "o", "validation"))["1.png"] == [caption(1), caption(1, 1)]
    assert not dict(rows(tmp_path / "o", "train")).keys() & {"0.png", "1.png", "2.png"} and len(seen) >= 10


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_addresses_are_not_fetched(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "csv":
        path.write_text("url,caption\nhttp://x/y.jpg,hello\n")
    else:
        pq.write_table(pa.table({"url": ["http://x/y.jpg"], "caption": ["hello"]}), path)
    with pytest.raises(UserError, match=r"not fetched.*img2dataset"):
        run(tmp_path / "o", path)


def test_paths_may_not_leave_the_folder(tmp_path):
    write_pictures(tmp_path, 1)
    inside = tmp_path / "data"
    write_pictures(inside, 3)
    (inside / "link.png").symlink_to("../0.png")
    (inside / "fine.png").symlink_to("1.png")
    (inside / "up").symlink_to("..")
    os.mkfifo(inside / "pipe.png")
    names = ["../0.png", f"{tmp_path}/0.png", "link.png", "up/0.png", "x/../../0.png", f"{inside}/2.png", "fine.png"]
    names += ["pipe.png", "http://x/0.png", "0.png\0", "\ud83d.png", "x" * 300, "up", "/dev/zero", "0.png/x"]
    lines = [json.dumps({"image": name, "caption": "x"}) for name in names]
    (inside / "captions.jsonl").write_text("\n".join(lines))
    run(tmp_path / "o", inside)
    assert [name for name, _ in rows(tmp_path / "o")] == ["2.png", "fine.png"]
    reasons = [reason for _, reason in skipped(tmp_path / "o")]
    assert [reasons.count(why) for why in ("outside", "not a file", "an address, not a file")] == [7, 1, 1]
    assert reasons.count("missing file") == 3 and len(reasons) == 12 + 1


def test_pictures_that_are_links_out_of_a_folder_of_files(tmp_path):
    write_pictures(tmp_path, 1)
    source = write_files(tmp_path / "data", 2)
    (source / "link.png").symlink_to("../0.png")
    (source / "link.txt").write_text("x")
    run(tmp_path / "o", source)
    assert len(rows(tmp_path / "o")) == 2 and skipped(tmp_path / "o") == [("link.png", "outside")]


def test_faults_of_captions(tmp_path):
    write_pictures(tmp_path / "data", 1)
    texts = ["", " \n", "x" * 10_001, "a\0b", "half \ud83d", "fine", ["fine", ""], [], [3], {}, 7]
    lines = [json.dumps({"image": "0.png", "caption": text}).encode() for text in texts]
    lines += [b"\xff\xfe", b"[1", b"3", b"[" * 100_000, b'{"image": 1' + b"0" * 5000 + b"}"]
    (tmp_path / "data" / "captions.jsonl").write_bytes(b"\n".join(lines))
    run(tmp_path / "o", tmp_path / "data")
    assert rows(tmp_path / "o") == [("0.png", ["half \ufffd", "fine", "fine"])]
    reasons = [reason for _, reason in skipped(tmp_path / "o")]
    assert reasons == [
        *("no caption", "caption empty", "caption too long", "caption with NUL", "caption empty", "no caption"),
        *("wrong type", "wrong type", "wrong type", *["not JSON"] * 2, "wrong type", *["not JSON"] * 2),
    ]


def test_patterns():
    assert paths.expand("gs://b/{00009..00011}.tar") == [f"gs://b/{n:05d}.tar" for n in (9, 10, 11)]
    assert paths.expand("gs://b/{a,b}/{1..2}") == [f"gs://b/{letter}/{n}" for letter in "ab" for n in (1, 2)]


@pytest.mark.parametrize("content", [{}, {"x.bin": b"x"}, {"x.png": b"x"}])
def test_folders_of_no_known_format_are_refused(tmp_path, content):
    (tmp_path / "data").mkdir()
    for name, data in content.items():
        (tmp_path / "data" / name).write_bytes(data)
    with pytest.raises(UserError, match="known format"):
        run(tmp_path / "o", tmp_path / "data")
    assert not (tmp_path / "o").exists()
