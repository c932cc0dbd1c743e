"""Sources: the user's folder, drawn shapes, and the messages about malformed data."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from simvlg_jax.data import sources, transforms
from simvlg_jax.data.sources import SOURCES, check_unique_ids, load_source
from simvlg_jax.data.sources.folder import split_of
from simvlg_jax.utils.errors import UserError


def synthetic(**sizes) -> ConfigDict:
    return ConfigDict({"name": "synthetic", "synthetic_size": {"train": 20, "val": 5, "test": 6} | sizes})


def folder(path, lines, name="captions.jsonl") -> ConfigDict:
    """Writes `lines` (dicts, or raw text) and every picture that they name."""
    for line in lines:
        if isinstance(line, dict):
            picture = path / line.get("image", line.get("file_name"))
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), "red").save(picture)
    (path / name).write_text("\n".join(json.dumps(line) if isinstance(line, dict) else line for line in lines))
    return ConfigDict({"name": "folder", "path": str(path)})


def test_folder_reads_pictures_and_captions(tmp_path):
    config = folder(
        tmp_path,
        [
            {"image": "sub/a.png", "caption": "a red square", "split": "train"},
            "",
            {"image": "b.png", "caption": ["red", "a square"], "split": "train"},
            {"image": "c.png", "caption": ["one", "two"], "split": "val"},
        ],
    )
    train = load_source(config, "train", training=True)
    assert [(record["id"], record["caption"]) for record in train] == [
        ("sub/a.png", "a red square"),
        ("b.png", "red"),
        ("b.png", "a square"),
    ]
    assert train[0]["image"] == (tmp_path / "sub/a.png").read_bytes()
    (record,) = load_source(config, "val")
    assert record["references"] == ["one", "two"]
    assert pickle.loads(pickle.dumps(train))[1] == train[1]


def test_folder_reads_imagefolder_metadata(tmp_path):
    lines = [{"file_name": "a.png", "text": "a red square", "split": "test"}]
    (record,) = load_source(folder(tmp_path, lines, "metadata.jsonl"), "test")
    assert (record["id"], record["caption"]) == ("a.png", "a red square")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_lines_of_one_picture_are_one_picture(tmp_path, split):
    lines = [("./a.png", "one"), ("b.png", "two"), ("sub/../a.png", ["three", "one"]), ("a.png", "one")]
    (tmp_path / "sub").mkdir()
    config = folder(tmp_path, [{"image": image, "caption": caption, "split": split} for image, caption in lines])
    references = {"a.png": ["one", "three", "one", "one"], "b.png": ["two"]}
    evaluated = load_source(config, split)
    assert [(r["id"], r["caption"], r["references"]) for r in evaluated] == [
        ("a.png", "one", references["a.png"]),
        ("b.png", "two", references["b.png"]),
    ]
    trained = load_source(config, split, training=True)
    assert [(r["id"], r["caption"]) for r in trained] == [
        ("a.png", "one"),
        ("b.png", "two"),
        ("a.png", "three"),
        ("a.png", "one"),
        ("a.png", "one"),
    ]
    assert all(r["references"] == references[r["id"]] for r in trained)


def test_lines_without_split_follow_the_line_that_names_one(tmp_path):
    lines = [{"image": f"{i}.png", "caption": "first"} for i in range(20)]
    lines += [{"image": f"./{i}.png", "caption": "second", "split": "test"} for i in range(20)]
    records = list(load_source(folder(tmp_path, lines), "test"))
    assert len(records) == 20 and all(r["references"] == ["first", "second"] for r in records)
    alone, other = ({"image": f"{dots}17.png", "caption": "x"} for dots in ("", "./"))  # by its name: val
    (record,) = load_source(folder(tmp_path, [alone, other]), split_of("17.png"))
    assert record["references"] == ["x", "x"]


def test_pictures_in_two_splits_are_warned_of_once(tmp_path, capsys):
    splits = {"a": ["train", "val"], "b": ["train", "val"], "c": ["test"], "d": ["train", "test"], "e": ["val", "val"]}
    lines = [{"image": f"{n}.png", "caption": "x", "split": split} for n, named in splits.items() for split in named]
    config = folder(tmp_path, lines)
    load_source(config, "val")
    of_val = (
        f"warning: {tmp_path}: 2 pictures are in train and in val, for example a.png: scores of val will be too good"
    )
    assert capsys.readouterr().err.splitlines() == [of_val]
    load_source(config, "val")
    load_source(config, "train", training=True)
    (of_test,) = capsys.readouterr().err.splitlines()
    assert "1 picture is in train and in test, for example d.png: scores of test" in of_test


def test_half_characters_in_captions_are_replaced_and_counted(tmp_path, capsys):
    captions = ["a \ud83d", ["\ud83d\ude00", "\udc00 b"], "fine"]
    config = folder(tmp_path, [{"image": "a.png", "caption": caption, "split": "val"} for caption in captions])
    (record,) = load_source(config, "val")
    assert record["references"] == ["a \ufffd", "\U0001f600", "\ufffd b", "fine"]
    (warning,) = capsys.readouterr().err.splitlines()
    assert "2 captions for val hold half a character" in warning


@pytest.mark.parametrize("name", ["../a.png", "sub/../../a.png", "{}/a.png"])
def test_pictures_outside_of_the_folder_are_refused_unless_allowed(tmp_path, name):
    names = ["..link.png", name.format(tmp_path)]
    config = folder(tmp_path / "inside", [{"image": image, "caption": "x", "split": "val"} for image in names])
    (tmp_path / "inside" / "..link.png").unlink()
    (tmp_path / "inside" / "..link.png").symlink_to("../a.png")
    with pytest.raises(UserError, match=r"captions\.jsonl, line 2: .* outside .*data\.allow_outside=True"):
        load_source(config, "train")
    config.allow_outside = True
    link, outside = load_source(config, "val")
    assert (link["id"], outside["id"]) == ("..link.png", names[1].replace("sub/../", ""))
    assert link["image"] == outside["image"] == (tmp_path / "a.png").read_bytes()


def test_folder_gives_ids_and_references_without_its_pictures(tmp_path):
    lines = [{"image": f"{i}.png", "caption": [f"{i} one", f"{i} two"], "split": "val"} for i in range(3)]
    config = folder(tmp_path, lines)
    for training in (False, True):
        source = load_source(config, "val", training=training)
        records = [(record["id"], record["references"]) for record in source]
        for i in range(3):
            (tmp_path / f"{i}.png").unlink()
        with pytest.raises(FileNotFoundError):
            source[0]
        assert [source.info(i)[:2] for i in range(len(source))] == records
        folder(tmp_path, lines)


def test_too_large_files_are_skipped_as_unreadable(tmp_path, monkeypatch):
    config = folder(tmp_path, [{"image": "a.png", "caption": "x", "split": "val"}])
    source = load_source(config, "val")
    assert source[0]["id"] == "a.png"
    monkeypatch.setattr(transforms, "MAX_BYTES", 10)
    with pytest.raises(transforms.UNREADABLE, match="more than the limit of 10"):
        source[0]


def test_shared_ids_are_refused():
    check_unique_ids(["a", "b"])
    with pytest.raises(UserError, match="two pictures of this split have the id 'b'; "):
        check_unique_ids(["a", "b", "b", "b"])
    with pytest.raises(UserError, match="have the id 'a', and 1 more ids are shared"):
        check_unique_ids(["a", "b", "b", "a"])


def test_folder_without_splits_is_divided_by_name(tmp_path):
    names = [f"{i}.png" for i in range(200)]
    config = folder(tmp_path, [{"image": name, "caption": "red"} for name in names])
    parts = {split: {r["id"] for r in load_source(config, split)} for split in ("train", "val", "test")}
    assert sum(map(len, parts.values())) == 200 and set().union(*parts.values()) == set(names)
    shares = np.array([[split_of(f"{i}") == split for split in ("val", "test")] for i in range(20_000)]).mean(0)
    np.testing.assert_allclose(shares, 0.05, atol=0.006)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 2: not JSON"),
        ("[1]", "line 2: not a JSON object"),
        ('{"caption": "x"}', 'line 2: no "image"'),
        ('{"image": "a.png"}', 'line 2: "caption"'),
        ('{"image": "a.png", "caption": []}', 'line 2: "caption"'),
        ('{"image": "a.png", "caption": ["x", 3]}', 'line 2: "caption"'),
        ('{"image": "a.png", "caption": "  "}', 'line 2: "caption"'),
        ('{"image": "a.png", "caption": "x", "split": "dev"}', 'line 2: unknown split "dev"'),
        ('{"image": "\\ud83d.png", "caption": "x"}', 'line 2: the name "\ufffd.png" holds half a character'),
        ('{"image": "%s.png", "caption": "x", "split": "train"}' % ("a" * 5000), r"are not in .*: a+\.\.\. \(line 2\)"),
        ("[" * 100_000, "line 2: not JSON"),
        ('{"image": "..", "caption": "x"}', r'line 2: "\.\." is outside'),
        ('{"image": "a/../../b", "caption": "x"}', r'line 2: "\.\./b" is outside'),
        ('{"image": "//etc", "caption": "x"}', 'line 2: "//etc" is outside'),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, message):
    config = folder(tmp_path, [{"image": "a.png", "caption": "x"}, line])
    with pytest.raises(UserError, match=message):
        load_source(config, "train")


def test_absent_pictures_are_named(tmp_path):
    config = folder(tmp_path, [{"image": "a.png", "caption": "x", "split": "train"}])
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"1 of the 1 pictures for train are not in .*: a\.png"):
        load_source(config, "train")


def test_absent_folder_file_path_and_split(tmp_path):
    with pytest.raises(UserError, match=r"has no captions\.jsonl"):
        load_source(ConfigDict({"name": "folder", "path": str(tmp_path)}), "train")
    for none in ("none", "a" * 5000):
        with pytest.raises(UserError, match="is not a folder"):
            load_source(ConfigDict({"name": "folder", "path": str(tmp_path / none)}), "train")
    with pytest.raises(UserError, match=r"data\.path"):
        load_source(ConfigDict({"name": "folder", "path": ""}), "train")
    config = folder(tmp_path, [{"image": "a.png", "caption": "x", "split": "train"}])
    with pytest.raises(UserError, match='in the split "val"'):
        load_source(config, "val")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read")
def test_unreadable_captions(tmp_path):
    (tmp_path / "captions.jsonl").symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match=r"cannot read .*captions\.jsonl: "):
        load_source(ConfigDict({"name": "folder", "path": str(tmp_path)}), "train")


@pytest.mark.parametrize("name", [name for name, kind in SOURCES.items() if kind.SPLITS])
def test_unknown_split(name, tmp_path):
    config = ConfigDict({"name": name, "path": str(tmp_path), "dir": str(tmp_path), "synthetic_size": {"train": 1}})
    with pytest.raises(UserError, match='no split "dev"; it has train, val, test'):
        load_source(config, "dev")


def test_unknown_data_set():
    config = ConfigDict({"name": "coco"})
    for function in (lambda: load_source(config, "train"), lambda: sources.test_splits(config)):
        with pytest.raises(
            UserError, match=r"data\.name is 'coco'; it takes 'openmoji', 'folder', 'prepared', 'synthetic', 'tfds'"
        ):
            function()


def test_unknown_cleaning():
    config = synthetic()
    config.clean = "blip"
    with pytest.raises(UserError, match=r"data\.clean is 'blip'; it takes '', 'blip_caption'"):
        load_source(config, "train")


@pytest.mark.parametrize(
    ("name", "scored"), [("openmoji", ["test", "novel"]), ("folder", ["test"]), ("synthetic", ["test"])]
)
def test_splits_that_are_scored_by_default(name, scored):
    assert sources.test_splits(ConfigDict({"name": name})) == scored
    assert set(scored) <= set(SOURCES[name].SPLITS)


def test_absent_openmoji_names_the_command(tmp_path):
    with pytest.raises(UserError, match=rf"python -m simvlg_jax\.data\.prepare --data_dir {tmp_path}"):
        load_source(ConfigDict({"name": "openmoji", "dir": str(tmp_path)}), "train")


def test_synthetic_pictures_are_deterministic_and_show_what_they_say():
    first, again = (list(load_source(synthetic(), "train")) for _ in range(2))
    assert [r["caption"] for r in first] == [r["caption"] for r in again]
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one["image"], other["image"])
        colour = Image.new("RGB", (1, 1), one["caption"].split()[1]).getpixel((0, 0))
        found = {tuple(pixel) for pixel in one["image"].reshape(-1, 3).tolist()}
        assert found == {colour, (255, 255, 255)}, one["caption"]
    assert len(load_source(synthetic(), "val")) == 5
    assert len({r["caption"] for r in first}) > 5
    train, val = (load_source(synthetic(val=20), split) for split in ("train", "val"))
    assert any((train[i]["image"] != val[i]["image"]).any() for i in range(20))


def test_synthetic_ids_and_references_are_given_without_drawing(monkeypatch):
    source = load_source(synthetic(), "test")
    records = [(record["id"], record["references"]) for record in source]
    assert records[3][0] == "test-3"
    monkeypatch.delattr("PIL.Image.new")
    with pytest.raises(AttributeError):
        source[0]
    assert [source.info(i)[:2] for i in range(6)] == records
