"""The clips of moving OpenMoji pictures: they show what their captions say, also in reverse, and splits share none."""

import io
import itertools

import av
import numpy as np
import pytest
from ml_collections import ConfigDict
from preparing import contents
from verbs import call

from simvlg_jax.config.load import load_config
from simvlg_jax.data.batch import Pictures
from simvlg_jax.data.openmoji import clips
from simvlg_jax.data.openmoji.clips import draw, encode, row_of
from simvlg_jax.data.openmoji.motions import FRAMES, MOTIONS, Event, Pose, Scene, with_article
from simvlg_jax.data.openmoji.scenes import FAMILIES, SIDE, SPLITS, THINGS, divide, held_out
from simvlg_jax.data.sources import load_source
from simvlg_jax.data.views import view_of
from simvlg_jax.tasks.build import build_text_encoder

COUNTS = {"train": 600, "val": 60, "test": 100, "unseen": 200}
FEW = {"train": 4, "val": 2, "test": 2, "unseen": 2}
AT = np.arange(FRAMES) / (FRAMES - 1)  # of a single motion


@pytest.fixture(scope="module")
def pictures(openmoji_data):
    return clips.read_pictures(openmoji_data.dir)


@pytest.fixture(scope="module")
def splits():
    return divide(COUNTS, 0)


@pytest.fixture(scope="module")
def scenes(splits):
    return list(itertools.chain(*splits.values()))


def frames_of(scene: Scene, pictures) -> np.ndarray:
    """Decodes the video of a scene: (F, S, S, 3)."""
    with av.open(io.BytesIO(encode(draw(scene, pictures)))) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def ink(frame: np.ndarray) -> np.ndarray:
    """(H, W), how far each pixel is from white, 0 where that may be noise of the video."""
    dark = 255 - frame.astype(float).mean(-1)
    return np.where(dark > 30, dark, 0)


def centre(frame: np.ndarray) -> np.ndarray:
    """x and y of the centre of the ink."""
    dark = ink(frame)
    return np.array([(dark.sum(0) * np.arange(dark.shape[1])).sum(), (dark.sum(1) * np.arange(len(dark))).sum()]) / (
        dark.sum()
    )


def extent(frame: np.ndarray) -> np.ndarray:
    """Width and height of the ink."""
    dark = ink(frame) > 0
    return np.array([np.ptp(np.flatnonzero(dark.any(0))), np.ptp(np.flatnonzero(dark.any(1)))]) + 1


def axis(frame: np.ndarray) -> float:
    """The angle of the longest axis of the ink, degrees clockwise from the x axis, up to half turns."""
    dark, (x, y) = ink(frame), centre(frame)
    dx, dy = np.meshgrid(np.arange(dark.shape[1]) - x, np.arange(len(dark)) - y)
    covariance = (dark * dx * dy).sum(), (dark * (dx**2 - dy**2)).sum() / 2
    return np.degrees(np.arctan2(*covariance)) / 2


def one(thing: str, motion: str, start: Pose | None, end: Pose | None, switch: int = 0) -> Scene:
    return Scene((Event(thing, motion, start, end, switch),))


def test_a_moving_thing_is_where_it_should_be(pictures):
    frames = frames_of(one("red apple", "left", Pose(46, 20, 32), Pose(18, 20, 32)), pictures)
    assert frames.shape == (FRAMES, SIDE, SIDE, 3)
    drawn = np.asarray(pictures["red apple"].resize((32, 32)))
    place = centre(drawn) - 16  # of its ink within the picture
    expected = np.stack([46 - 28 * AT, np.full(FRAMES, 20)], 1) + place
    found = np.stack([centre(frame) for frame in frames])
    np.testing.assert_allclose(found, expected, atol=1)
    # The colours are the picture's, where it is at the end.
    assert np.abs(frames[-1][4:36, 2:34].astype(float) - drawn).mean() < 6


def test_a_growing_thing_has_the_size_that_it_should_have(pictures):
    frames = frames_of(one("castle", "grow", Pose(30, 34, 20), Pose(30, 34, 56)), pictures)
    whole = extent(np.asarray(pictures["castle"])) / SIDE
    sizes = 20 + 36 * AT
    np.testing.assert_allclose([extent(frame) for frame in frames], sizes[:, None] * whole, atol=2.5)


def test_a_turning_thing_turns_clockwise(pictures):
    frames = frames_of(one("skateboard", "clockwise", Pose(32, 32, 44, -40), Pose(32, 32, 44, 60)), pictures)
    still = axis(np.asarray(pictures["skateboard"]))
    turned = np.array([axis(frame) for frame in frames]) - still - (-40 + 100 * AT)
    np.testing.assert_allclose((turned + 90) % 180 - 90, 0, atol=4)


def test_a_thing_appears_at_its_frame(pictures):
    frames = frames_of(one("key", "appear", None, Pose(30, 30, 50), switch=8), pictures)
    there = [bool(ink(frame).any()) for frame in frames]
    assert there == [False] * 8 + [True] * 12


def test_one_thing_after_the_other(pictures):
    scene = Scene(
        (
            Event("red apple", "right", Pose(14, 16, 28), Pose(48, 16, 28)),
            Event("duck", "vanish", Pose(20, 48, 28), None, 3),
        )
    )
    assert scene.caption() == "a red apple moves to the right, then a duck vanishes"
    assert scene.reverse().caption() == "a duck appears, then a red apple moves to the left"
    frames = frames_of(scene, pictures)
    upper = np.array([centre(frame[:32])[0] for frame in frames])
    offset = centre(np.asarray(pictures["red apple"].resize((28, 28))))[0] - 14
    expected = np.concatenate([14 + 34 * np.arange(10) / 9, np.full(10, 48)]) + offset
    np.testing.assert_allclose(upper, expected, atol=1)
    assert [bool(ink(frame[32:]).any()) for frame in frames] == [True] * 13 + [False] * 7


def changes(scene: Scene, first: int, last: int) -> dict[str, str]:
    """What is seen of each thing between two frames, in the words of captions."""
    before, after = dict(scene.at(first)), dict(scene.at(last))
    found = {}
    for thing in {*before, *after}:
        if thing not in before:
            found[thing] = "appears"
        elif thing not in after:
            found[thing] = "vanishes"
        else:
            x, y, size, angle = (b - a for a, b in zip(before[thing], after[thing], strict=True))
            words = [
                (x > 0, "moves to the right"),
                (x < 0, "moves to the left"),
                (y > 0, "moves down"),
                (y < 0, "moves up"),
                (size > 0, "grows"),
                (size < 0, "shrinks"),
                (angle > 0, "turns clockwise"),
                (angle < 0, "turns counterclockwise"),
            ]
            seen = [word for is_so, word in words if is_so]
            if seen:
                (found[thing],) = seen
    return found


def said(scene: Scene) -> str:
    """The caption, from what is seen in each part of the clip."""
    half, parts, last = FRAMES // 2, [], None
    bounds = [(0, FRAMES - 1)] if len(scene.events) == 1 else [(0, half - 1), (half, FRAMES - 1)]
    for bound in bounds:
        found = changes(scene, *bound)
        if not found:
            return f"{with_article(scene.at(0)[0][0])} stays still"
        ((thing, words),) = found.items()
        parts.append(f"{'it' if thing == last else with_article(thing)} {words}")
        last = thing
    return ", then ".join(parts)


def test_captions_are_true_of_the_clips_and_of_their_reverses(scenes):
    for scene in scenes:
        assert scene.caption() == said(scene)
        assert scene.reverse().caption() == said(scene.reverse())
    assert {scene.group for scene in scenes} == {*FAMILIES, "still", "two things", "two motions"}
    assert {event.motion for scene in scenes for event in scene.events} == set(MOTIONS)


def test_the_reverse_of_the_reverse_is_the_clip_and_captions_are_exchanged(scenes, pictures):
    for scene in scenes:
        reverse = scene.reverse()
        assert reverse.reverse() == scene
        own, other = row_of(scene), row_of(reverse)
        if scene.group == "still":
            assert reverse == scene and "reverse_caption" not in own
        else:
            assert (own["caption"], own["reverse_caption"]) == (other["reverse_caption"], other["caption"])
            assert own["caption"] != own["reverse_caption"] and own["video_id"] != other["video_id"]
        assert own["group"] == other["group"]
        for frame in range(FRAMES):
            assert scene.at(frame) == reverse.at(FRAMES - 1 - frame)
    for scene in scenes[::80]:
        np.testing.assert_array_equal(draw(scene.reverse(), pictures), draw(scene, pictures)[::-1])


def test_things_stay_in_the_frame_and_apart(scenes):
    for scene in scenes:
        for frame in range(FRAMES):
            boxes = []
            for _, (x, y, size, _) in scene.at(frame):
                low, high = np.array([x, y]) - size / 2, np.array([x, y]) + size / 2
                assert (low >= 0).all() and (high <= SIDE).all()
                boxes.append((low, high))
            if len(boxes) == 2:
                (low, high), (other_low, other_high) = boxes
                assert (high <= other_low).any() or (other_high <= low).any()


def test_single_frames_do_not_tell_the_direction(splits):
    """Of each pair of opposite motions the poses are alike, only their order differs."""
    mean: dict[str, list[float]] = {}
    for scene in splits["train"]:
        if len(scene.events) == 1 and scene.group not in ("presence", "still"):
            (event,) = scene.events
            mean.setdefault(event.motion, []).append(np.mean([event.start, event.end], 0))
    for name, motion in MOTIONS.items():
        if name in mean:
            difference = np.mean(mean[name], 0) - np.mean(mean[motion.opposite], 0)
            error = np.sqrt(sum(np.var(mean[m], 0) / len(mean[m]) for m in (name, motion.opposite)))
            assert (np.abs(difference) <= 4 * error + 1e-9).all(), name


def test_nothing_looks_alike_when_it_is_turned(pictures):
    for thing in THINGS:
        upright = np.asarray(clips._frame([(thing, Pose(32, 32, 44))], pictures), float)
        for angle in (25, 50, 75, 100, 125, 150):
            turned = np.asarray(clips._frame([(thing, Pose(32, 32, 44, angle))], pictures), float)
            assert np.abs(upright - turned).mean() > 0.25 * np.abs(upright - 255).mean(), (thing, angle)


def test_splits_share_no_clip_nor_its_reverse(splits):
    ids = {split: {scene.id for own in found for scene in (own, own.reverse())} for split, found in splits.items()}
    assert {split: len(found) for split, found in splits.items()} == COUNTS
    assert sum(map(len, ids.values())) == len(set().union(*ids.values()))
    for found in splits.values():
        assert len({scene.id for scene in found}) == len(found)


def test_unseen_combinations_have_things_and_motions_that_are_in_training(splits):
    def combinations(*names: str) -> set[tuple[str, str]]:
        return {
            (event.thing, MOTIONS[event.motion].family)
            for name in names
            for scene in splits[name]
            for event in scene.events
        }

    seen, unseen = combinations("train", "val", "test"), combinations("unseen")
    assert not seen & unseen
    assert {thing for thing, _ in unseen} <= {thing for thing, _ in combinations("train")}
    assert {family for _, family in unseen} == set(FAMILIES)
    for family in FAMILIES:
        assert sum(held_out(thing) == family for thing in THINGS) >= len(THINGS) / 10


def test_scenes_depend_on_the_seed_and_not_on_the_number_of_training_clips(splits):
    more = divide(COUNTS | {"train": 700}, 0)
    assert {split: more[split][: COUNTS[split]] for split in SPLITS} == splits
    other = divide(FEW, 1)
    assert not set(other["test"]) & set(splits["test"])


def make(folder, data, **options) -> int:
    return call(
        clips, "--output", folder, "--data_dir", data.dir, *(f"--{key}={value}" for key, value in options.items())
    )


@pytest.fixture(scope="module")
def made(openmoji_data, tmp_path_factory):
    """The folder that the command writes."""
    folder = tmp_path_factory.mktemp("clips") / "made"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clips, "COUNTS", FEW)
        assert make(folder, openmoji_data, clips=FEW["train"]) == 0
    return folder


def test_prepared_set_gives_the_clips_their_captions_and_those_of_the_reverse(made, pictures):
    view = view_of(Pictures(SIDE, 4))
    for split, scenes in divide(FEW, 0).items():
        source = load_source(ConfigDict({"name": "prepared", "path": str(made), "frames": 4}), split)
        assert len(source) == FEW[split]
        for index, scene in enumerate(scenes):
            info, record = source.info(index), source[index]
            reverse = None if scene.group == "still" else scene.reverse().caption()
            assert (info.id, info.references) == (scene.id, [scene.caption()])
            assert (info.extras.group, info.extras.reverse_caption) == (scene.group, reverse)
            assert record["image"] == (made / "source" / "videos" / f"{scene.id}.mp4").read_bytes()
            sampled = view.evaluate(record)
            drawn = draw(scene, pictures)[[0, 5, 10, 15]]
            assert np.abs(sampled.astype(float) - drawn).mean() < 6


def test_the_same_frames_give_the_same_video(pictures):
    for scene in itertools.chain(*divide(FEW, 0).values()):
        frames = draw(scene, pictures)
        first = encode(frames)
        assert all(encode(frames) == first for _ in range(20))


def test_the_same_arguments_give_the_same_files_also_after_an_interruption(made, openmoji_data, tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "COUNTS", FEW)
    encoded = []

    def fail_at_the_sixth(frames):
        encoded.append(len(frames))
        if len(encoded) == 6:
            raise KeyboardInterrupt
        return encode(frames)

    monkeypatch.setattr(clips, "encode", fail_at_the_sixth)
    again = tmp_path / "made"
    assert make(again, openmoji_data, clips=FEW["train"]) == 130
    assert make(again, openmoji_data, clips=FEW["train"]) == 0
    assert len(encoded) == sum(FEW.values()) + 1
    for name, content in contents(made).items():
        if not name.startswith("prepared-"):  # which names the folder of the source
            found = (again / name).read_bytes()
            assert found.replace(str(again).encode(), str(made).encode()) == content, name
    stamps = {path: path.stat().st_mtime_ns for path in (again / "source" / "videos").iterdir()}
    assert make(again, openmoji_data, clips=FEW["train"]) == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps and len(encoded) == sum(FEW.values()) + 1


def test_another_seed_does_not_overwrite_the_data(made, openmoji_data, monkeypatch, capsys):
    monkeypatch.setattr(clips, "COUNTS", FEW)
    before = contents(made)
    assert make(made, openmoji_data, clips=FEW["train"], seed=1) == 1
    assert "choose another --output" in capsys.readouterr().err
    assert contents(made) == before
    assert make(made, openmoji_data, clips=0) == 2


def test_no_caption_is_too_long_for_the_config():
    config = load_config("configs/openmoji.py:clips")
    encoder = build_text_encoder(config)
    longest = max((motion.words for motion in MOTIONS.values()), key=lambda words: len(encoder(words)[0]))
    for first, second in itertools.permutations(THINGS, 2):
        text = f"{with_article(first)} {longest}, then {with_article(second)} {longest}"
        assert encoder(text)[0][-1] == encoder.end, text
