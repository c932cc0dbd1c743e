"""The tools on clips: train from an image model, evaluate, caption, report, export; from prepared videos to a page."""

import base64
import functools
import io
import json

import av
import jax
import numpy as np
import pytest
from PIL import Image
from verbs import call

from simvlg_jax import api, caption, evaluate, export, to_torch, train
from simvlg_jax.config.saved import read_config
from simvlg_jax.data import prepare
from simvlg_jax.data.batch import Pictures
from simvlg_jax.data.pictures import read_picture, read_visual
from simvlg_jax.evaluation.report.merge_map import merge_map, sheet_layout
from simvlg_jax.evaluation.report.pictures import video_url
from simvlg_jax.utils.errors import UserError

CODECS = {"mp4": "libx264", "avi": "mpeg4"}
MERGED = ["video.frames_as=merged", "video.tokens=20", "video.max_frames=4"]


def write_clip(path, number: int, frames: int = 6) -> None:
    """A bright square that moves over a background whose colour depends on the number."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[path.suffix[1:]], rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for time in range(frames):
            pixels = np.full((32, 32, 3), (40 * number % 256, 90, 200 - 30 * number), np.uint8)
            pixels[8:16, 4 * time : 4 * time + 8] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Returns a folder of clips, and the folder of what `prepare` wrote of them."""
    folder, prepared = tmp_path_factory.mktemp("clips"), tmp_path_factory.mktemp("prepared")
    for number in range(4):
        suffix = "avi" if number == 3 else "mp4"
        write_clip(folder / f"{number}.{suffix}", number)
        (folder / f"{number}.txt").write_text(f"clip {number}")
    assert call(prepare, "--source", folder, "--output", prepared, "--workers", 1) == 0
    return folder, prepared


@pytest.fixture(scope="module")
def run(clips, tmp_path_factory):
    """Returns a run of clips, merged across time, that has started from the exported weights of a run of pictures."""
    image_run, workdir = tmp_path_factory.mktemp("image"), tmp_path_factory.mktemp("run")
    common = ["--config", "configs/tiny.py", *options("mesh.data=1", "train.steps=1", "evals.val.every=0")]
    assert call(train, *common, "--workdir", image_run) == 0
    assert call(export, "--workdir", image_run, "--output", image_run / "exported") == 0
    start = [f"train.init_from={image_run}/exported/weights.safetensors", "connector.weights="]
    start += ["connector.position_norm=9.0"]
    data = [
        "data.name=prepared",
        f"data.path={clips[1]}",
        "data.frames=4",
        "train.batch_size=4",
        "evals.val.split=train",
    ]
    assert call(train, *common, *options(*start, *data, *MERGED), "--workdir", workdir) == 0
    return workdir


def options(*flags: str) -> list[str]:
    return [f"--config.{flag}" for flag in flags]


def test_clips_are_evaluated_and_shown_with_their_frames_and_map(run):
    assert call(evaluate, "--workdir", run, "--split", "train") == 0
    results = json.loads((run / "eval" / "train.json").read_text())
    assert results["num_examples"] == 4 and results["visual_tokens"] == 21 - 10
    for example in results["examples"]:
        assert example["frames"] == 4 and len(example["source_map"]) == 1 + 4 * 16
        assert set(example["source_map"]) == set(range(11))
        picture = Image.open(io.BytesIO(base64.b64decode(example["image"])))
        assert picture.size == (4 * 32, 32)
    videos = [example["video"] for example in results["examples"]]
    assert sum(video is None for video in videos) == 1, "no browser shows MPEG-4 part 2 in AVI"
    page = (run / "report.html").read_text()
    assert page.count("<video ") == 3 and page.count('viewBox="0 0 16 4"') == 4
    assert "4 clips drawn" in page and "· 4 clips" in page and "against other clips (shuffled)" in page
    assert "4 frames of 16 patches → 11 tokens" in page


def test_captions_of_clips_and_of_pictures(run, clips, tmp_path, capsys):
    Image.new("RGB", (20, 20), (90, 90, 90)).save(tmp_path / "still.png")
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    arguments = [clips[0], tmp_path / "still.png", tmp_path / "broken.mp4"]
    assert call(caption, "--workdir", run, *arguments) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"].split("/")[-1] for line in lines] == [
        *("0.mp4", "1.mp4", "2.mp4", "3.avi"),
        *("still.png", "broken.mp4"),
    ]
    assert all("caption" in line for line in lines[:5]) and "cannot read" in lines[5]["error"]
    model = api.load(run)
    assert model.captions([clips[0] / "0.mp4", tmp_path / "still.png"]) == [lines[0]["caption"], lines[4]["caption"]]
    explained = model.explain(clips[0] / "0.mp4")
    assert explained.layers[-1].shape == (65,) and explained.tokens


def test_a_model_of_clips_is_exported_and_loaded_again(run, tmp_path):
    assert call(export, "--workdir", run, "--output", tmp_path / "exported") == 0
    assert read_config(tmp_path / "exported").video.frames_as == "merged"
    assert call(export, "--workdir", tmp_path / "exported", "--output", tmp_path / "again") == 0
    models = api.load(tmp_path / "again"), api.load(run, overrides=["--config.dtype=float32"])
    equal = functools.partial(np.testing.assert_allclose, rtol=2**-8)  # an export has bfloat16 weights
    jax.tree.map(equal, models[0].params["connector"], models[1].params["connector"])
    clip = np.random.default_rng(0).integers(0, 256, (6, 40, 40, 3), dtype=np.uint8)
    assert models[0].caption(clip) == models[1].caption(clip)
    assert call(to_torch, "--workdir", run, "--format", "hf", "--output", tmp_path / "hf") == 0
    assert call(to_torch, "--workdir", run, "--format", "evlgen", "--output", tmp_path / "x.safetensors") == 1


def test_the_weights_take_another_way_to_join_frames(run, clips, tmp_path):
    """The same weights, with another way to join frames: evaluated into a folder of its own."""
    way = options("video.frames_as=joined", "video.tokens=0", "connector.tokens=18")
    assert call(evaluate, "--workdir", run, "--split", "train", "--output", tmp_path / "joined", *way) == 0
    assert json.loads((tmp_path / "joined" / "eval" / "train.json").read_text())["visual_tokens"] == 18


def test_a_clip_is_read_as_its_evenly_spread_frames_and_a_picture_as_a_still_one(clips, tmp_path):
    shape, path = Pictures(32, 3), clips[0] / "0.mp4"
    clip = read_visual(path, shape)
    assert clip.shape == (3, 32, 32, 3)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(read_visual(frames, shape), frames[[0, 2, 4]])
    np.testing.assert_array_equal(read_visual(frames[0], shape), frames[[0, 0, 0]])
    np.testing.assert_array_equal(read_visual(frames[0], Pictures(32)), frames[0])
    for given in (path, frames):
        with pytest.raises(UserError, match="the model takes pictures"):
            read_picture(given, Pictures(32))
    stills = [Image.fromarray(frame) for frame in frames]
    stills[0].save(tmp_path / "moving.gif", save_all=True, append_images=stills[1:])
    moving, still = read_visual(tmp_path / "moving.gif", shape), read_visual(tmp_path / "moving.gif", Pictures(32))
    assert moving.shape == (3, 32, 32, 3) and (moving[0] != moving[1]).any() and still.shape == (32, 32, 3)


def test_frames_fill_a_sheet_and_their_patches_are_drawn_in_their_places():
    assert [sheet_layout(n) for n in (1, 2, 4, 6, 8, 9, 7, 16)] == [
        *((1, 1), (1, 2), (1, 4), (1, 6), (2, 4), (3, 3), (1, 7), (4, 4)),
    ]
    source_map = [0, *range(1, 33)]  # a class token, and eight frames of 2 x 2 patches
    source_map[1 + 4 * 5 + 2] = source_map[1]  # row 1, column 0 of frame 5 is one token with the first patch
    (layer,) = merge_map([source_map], frames=8).layers
    assert layer.merged == "M0 0h1M2 3h1"
    with pytest.raises(ValueError, match="not a square of patches"):
        merge_map([source_map], frames=5)


def test_only_small_clips_that_browsers_show_are_embedded(clips):
    small, other = ((clips[0] / name).read_bytes() for name in ("0.mp4", "3.avi"))
    assert video_url(small) == f"data:video/mp4;base64,{base64.b64encode(small).decode()}"
    assert video_url(other) is None and video_url(small + bytes(200_000)) is None
    assert video_url(np.zeros((2, 2, 3), np.uint8)) is None and video_url(b"\0\0\0\0ftyp") is None
