"""Record sources: the user's folder, drawn shapes, and what is said when data is wrong."""

import json
import pickle

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from simvlg_jax.data.folder import split_of
from simvlg_jax.data.sources import load_source
from simvlg_jax.errors import UserError


def synthetic(**sizes) -> ConfigDict:
    return ConfigDict({"name": "synthetic", "synthetic_size": {"train": 20, "val": 5, "test": 6} | sizes})


def folder(path, lines, name="captions.jsonl") -> ConfigDict:
    """Writes `lines` (dicts, or text as it is) and every picture that they name."""
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
    train = load_source(config, "train")
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
    with pytest.raises(UserError, match="is no folder"):
        load_source(ConfigDict({"name": "folder", "path": str(tmp_path / "none")}), "train")
    with pytest.raises(UserError, match=r"data\.path"):
        load_source(ConfigDict({"name": "folder", "path": ""}), "train")
    config = folder(tmp_path, [{"image": "a.png", "caption": "x", "split": "train"}])
    with pytest.raises(UserError, match='in the split "val"'):
        load_source(config, "val")


@pytest.mark.parametrize("name", ["openmoji", "folder", "synthetic"])
def test_unknown_split(name, tmp_path):
    config = ConfigDict({"name": name, "path": str(tmp_path), "dir": str(tmp_path), "synthetic_size": {"train": 1}})
    with pytest.raises(UserError, match='no split "dev"; it has train, val, test'):
        load_source(config, "dev")


def test_unknown_data_set():
    with pytest.raises(UserError, match='unknown data set "coco"; there are openmoji, folder, synthetic'):
        load_source(ConfigDict({"name": "coco"}), "train")


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
