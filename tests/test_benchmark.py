"""The benchmarks: what they print, and that the loaders read the same pictures."""

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from verbs import call

from simvlg_jax.benchmark import captioning, loader, stability, storage, torch_loader
from simvlg_jax.benchmark.photos import write_photos
from simvlg_jax.config.load import load_config
from simvlg_jax.data import transforms
from simvlg_jax.data.sources import load_source
from simvlg_jax.training import loop
from simvlg_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos")
    write_photos(path, 20, (320, 240))
    return path


def test_photos_are_as_large_as_photographs_and_are_made_once(tmp_path):
    mean = write_photos(tmp_path, 3, (640, 480))
    assert 40_000 < mean < 100_000
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.jpg")}
    assert len(before) == 3 and write_photos(tmp_path, 3, (640, 480)) == mean
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.jpg")}


def test_torch_loader_gives_pillows_views_and_the_captions_ids(folder):
    spec = loader.layout()
    source = load_source(loader.data_config(folder), "train", training=True)
    pairs = torch_loader.Pairs(source, spec.texts["caption"].encoder, loader.SIDE, (0.5, 1.0))
    picture, ids = pairs[3]
    assert picture.shape == (224, 224, 3) and str(picture.dtype) == "torch.uint8"
    expected, _ = spec.texts["caption"].encoder(source[3]["caption"])
    assert ids.tolist() == expected + [0] * (loader.TOKENS - len(expected))
    view = torch_loader.pillow_view(transforms.decode(source[3]["image"]), 224, (0.5, 1.0), np.random.default_rng(1))
    ours = transforms.augment(transforms.pixels(source[3]["image"]), 224, (0.5, 1.0), True, np.random.default_rng(1))
    np.testing.assert_array_equal(view, ours)


def test_prints_stages_ratios_and_the_reduced_difference(folder, monkeypatch, capsys):
    arguments = f"--dir {folder} --count 20 --size 320x240 --batch_size 2 --batches 2 --rounds 2 --reduced"
    monkeypatch.setattr(sys, "argv", ["loader", *arguments.split()])
    monkeypatch.setattr(loader, "SIDE", 64)
    loader.main()
    out = capsys.readouterr().out
    assert "20 synthetic JPEGs of 320 x 240" in out and "all 20 views have Pillow's bytes" in out
    assert re.search(r"reduced: \d+% of the views are decoded smaller; these differ by \d\.\d\d of 255", out)
    for name in ("ours, 2 threads", "ours, 2 workers", "ours, 2 threads, reduced", "torch, 2 workers"):
        assert re.search(rf"^{name} +\d+ +\d+\.\d\d   \d+\.\d\d to \d+\.\d\d$", out, re.M), name


def test_speeds_are_compared_within_a_round():
    table = loader.speed_table({"ours": [20.0, 90.0, 40.0], "torch": [10.0, 30.0, 10.0]})
    assert re.search(r"ours +40 +3\.00   2\.00 to 4\.00", table)


def test_too_few_pictures_are_refused(folder):
    with pytest.raises(UserError, match="raise --count or lower --batches"):
        loader.measure(folder, batch_size=8, batches=1, rounds=1, reduced=False)


def test_storage_measures_opening_and_every_order(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(storage, "forget", lambda folder: None)  # the suite's folder may be in memory
    counted = iter(storage.Reads(100 * n, 10**6 * n) for n in range(6))
    monkeypatch.setattr(storage, "reads_of", lambda folder: next(counted))
    assert call(storage, "--dir", tmp_path, "--lines", 7, "--records", 9000, "--pictures", 50) == 0
    listed, tars, copied, *orders = capsys.readouterr().out.splitlines()
    assert listed.startswith("JSONL        7 pictures listed in ")
    assert tars.startswith("tars         12,000 captions opened in ")
    assert copied.startswith("ArrayRecord  12,000 captions opened in ")
    assert len(orders) == len(storage.ORDERS)
    assert all("2.50 reads a picture,     10 kB each" in line for line in orders)  # 100 reads of 40 pictures
    assert list(tmp_path.iterdir()) == []


def test_storage_copies_are_what_prepare_writes(tmp_path):
    storage.write_large_copy(tmp_path, 8197)
    source = load_source(storage.data_config(tmp_path), "train", training=True)
    assert len(source) == 8197 + 2733  # every third has two captions
    assert len(list(tmp_path.glob("large-train.array_record-*-of-00003"))) == 3
    assert source[5]["id"] == "00000/000000003" and source[5]["image"] == b""


def test_storage_refuses_what_it_cannot_measure(tmp_path, capsys):
    assert call(storage, "--records", -1) == 2
    with pytest.raises(UserError, match="choose another --dir"):
        storage.reads_of(Path("/proc"))


def test_stability_counts_what_differs():
    maps = np.array([[0, 1], [1, 1], [0, 0]])
    wanted = stability.Outcome(maps, ["a dog", "a cat", "a cow"])
    found = stability.Outcome(maps ^ [[0, 0], [1, 0], [1, 1]], ["a dog", "a cat", "the cow"])
    assert stability.compare(wanted, wanted) == "0 merge otherwise, 0 captions differ"
    assert stability.compare(found, wanted) == "2 merge otherwise, 1 captions differ"


def test_stability_compares_batch_sizes_and_devices(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # the verb adds to it
    flags = ["train.steps=1", "evals.val.every=0", "evaluate.max_new_tokens=4", "data.synthetic_size.val=10"]
    loop.train(load_config("configs/tiny.py", [f"--config.{flag}" for flag in flags]), tmp_path)
    capsys.readouterr()
    arguments = ["--workdir", tmp_path, "--pictures", 6, "--batch_sizes", "1,4", "--devices", "1,4"]
    assert call(stability, *arguments) == 0
    layouts = ["1 devices, batch 4", "1 devices, batch 1", "4 devices, batch 4"]
    equal = "0 merge otherwise, 0 captions differ"
    assert capsys.readouterr().out.splitlines() == [f"6 pictures, {layout}: {equal}" for layout in layouts]
    assert call(stability, "--example", "--batch_sizes", "0") == 2


def test_captions_are_timed_beside_those_of_pytorch(tmp_path, capsys):
    flags = ["train.steps=1", "evals.val.every=0", "evaluate.max_new_tokens=4", "data.synthetic_size.val=6"]
    loop.train(load_config("configs/tiny.py", [f"--config.{flag}" for flag in [*flags, "mesh.data=1"]]), tmp_path)
    capsys.readouterr()
    arguments = ["--workdir", tmp_path, "--split", "val", "--batch_size", 4, "--rounds", 2]
    assert call(captioning, *arguments) == 0
    greedy, beams = [line for line in capsys.readouterr().out.splitlines() if "ratio" in line]
    assert re.fullmatch(r"greedy   ours +[\d.]+ images/s, PyTorch +[\d.]+: ratio .*; 4 of 4 captions equal", greedy)
    assert re.fullmatch(r"5 beams  ours .*; 4 of 4 captions equal", beams)
    line = captioning.report("greedy", [20.0, 90.0, 40.0], [10.0, 30.0, 10.0], 3, 4)
    assert line == "greedy   ours   40.0 images/s, PyTorch   10.0: ratio 3.00 (2.00 to 4.00); 3 of 4 captions equal"
