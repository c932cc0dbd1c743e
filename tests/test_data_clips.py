"""Video: which frames are chosen, that they are the right ones, and that no file crashes the decoder."""

import io
import struct
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simvlg_jax.data import clips, containers, transforms
from simvlg_jax.data.batch import BatchSpec, Pictures, TextSpec
from simvlg_jax.data.pipeline import make_eval_batches
from simvlg_jax.data.skipped import REASONS, reason
from simvlg_jax.data.statistics import describe
from simvlg_jax.data.text import CaptionText, character_tokenizer

av = pytest.importorskip("av")
SIDE = 32
FORMATS = [("mp4", "libx264"), ("mp4", "mpeg4"), ("matroska", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4")]
FORMATS += [("avi", "mjpeg"), ("mpegts", "libx264"), ("webm", "libvpx-vp9")]


def numbered(number: int, width: int, height: int) -> np.ndarray:
    """A frame whose two halves, upper and lower, are the tens and the ones of its number as shades of grey."""
    frame = np.empty((height, width, 3), np.uint8)
    frame[: height // 2], frame[height // 2 :] = 20 + 20 * (number // 10), 20 + 20 * (number % 10)
    return frame


def number_of(frame: np.ndarray) -> int:
    side = len(frame)
    tens, ones = frame[2 : side // 2 - 2].mean(), frame[side // 2 + 2 : -2].mean()
    return round((tens - 20) / 20) * 10 + round((ones - 20) / 20)


def numbers(frames: np.ndarray) -> list[int]:
    return [number_of(frame) for frame in frames]


def video(
    frames=24,
    container="mp4",
    codec="libx264",
    size=(64, 48),
    times=None,
    audio=False,
    gop=6,
    pixels="",
    drop=0,
    b_frames=None,
    **options,
) -> bytes:
    """An encoded clip. `times` are the frames' times in units of 1/30 s, and `drop` packets at the start are lost."""
    left_out = iter(range(drop))
    if b_frames is None:
        b_frames = 2 if codec == "mpeg4" and container == "mp4" else 0

    def mux(packets):
        for packet in packets:
            if next(left_out, None) is None:
                file.mux(packet)

    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream(codec, rate=30, options=options) if frames else None
        sound = file.add_stream("aac" if container == "mp4" else "libopus", rate=48000) if audio else None
        if stream:
            stream.width, stream.height = size
            stream.pix_fmt = pixels or ("yuvj420p" if codec == "mjpeg" else "yuv420p")
            stream.gop_size, stream.bit_rate = gop, 2_000_000
            if codec.startswith("mpeg"):
                stream.codec_context.max_b_frames = b_frames
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered(number, *size), "rgb24")
            frame.pts = number if times is None else times[number]
            mux(stream.encode(frame))
        if stream:
            mux(stream.encode())
        if sound:
            silence = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
            silence.sample_rate = 48000
            file.mux(sound.encode(silence))
            file.mux(sound.encode())
    return out.getvalue()


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [
        (10, 5, [0, 2, 4, 6, 8]),
        (10, 4, [0, 2, 5, 7]),
        (7, 3, [0, 2, 4]),
        (49, 49, list(range(49))),
        (5, 1, [0]),
        (2, 4, [0, 1, 1, 1]),
        (1, 2, [0, 0]),
    ],
)
def test_uniform_frames_begin_equal_segments(total, count, expected):
    assert clips.frame_indices(total, count, "uniform").tolist() == expected


@given(st.integers(1, 500), st.integers(1, 40), st.integers(0, 2**32))
def test_headtail_draws_distinct_frames_from_both_halves(total, count, seed):
    indices = clips.frame_indices(total, count, "headtail", np.random.default_rng(seed))
    chosen = min(total, count)
    assert indices.dtype == np.int64 and len(indices) == count
    head, tail, rest = np.split(indices, [chosen // 2, chosen])
    assert ((head >= 0) & (head < total // 2)).all() and ((tail >= total // 2) & (tail < total)).all()
    assert (np.diff(head) > 0).all() and (np.diff(tail) > 0).all() and (rest == total - 1).all()
    again = clips.frame_indices(total, count, "headtail", np.random.default_rng(seed))
    np.testing.assert_array_equal(indices, again)


@given(st.integers(1, 2000), st.integers(1, 64))
def test_uniform_is_the_floor_of_equal_steps(total, count):
    indices = clips.frame_indices(total, count, "uniform").tolist()
    chosen = min(total, count)
    assert indices == [i * total // chosen for i in range(chosen)] + [total - 1] * (count - chosen)


def test_other_ways_to_choose_frames_are_refused():
    with pytest.raises(ValueError, match="not 'middle'"):
        clips.frame_indices(9, 3, "middle")


@pytest.mark.parametrize("gop", [1, 6, 100])
@pytest.mark.parametrize(("container", "codec"), FORMATS)
def test_frames_are_the_chosen_ones(container, codec, gop):
    data = video(24, container, codec, gop=gop)
    frames = clips.decode(data, 6, "uniform", SIDE)
    assert frames.shape == (6, SIDE, SIDE, 3) and frames.dtype == np.uint8
    assert numbers(frames) == [0, 4, 8, 12, 16, 20]
    assert numbers(clips.decode(data, 24, "uniform", SIDE)) == list(range(24))
    drawn = clips.decode(data, 5, "headtail", SIDE, np.random.default_rng(1))
    assert numbers(drawn) == clips.frame_indices(24, 5, "headtail", np.random.default_rng(1)).tolist()


def test_only_the_parts_that_hold_chosen_frames_are_decoded():
    """The others are overwritten, which damages them beyond decoding."""
    data = bytearray(video(24, "mp4", "libx264", gop=6))
    with av.open(io.BytesIO(data)) as file:
        packets = [packet for packet in file.demux(file.streams.video[0]) if packet.size]
        packets.sort(key=lambda packet: packet.pts)
        _, first, last, *_ = (number for number, packet in enumerate(packets) if packet.is_keyframe)
        assert 0 < first < last <= 12
        for packet in packets[first:last]:
            data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    assert numbers(clips.decode(bytes(data), 2, "uniform", SIDE)) == [0, 12]


@pytest.mark.parametrize("size", [(64, 48), (34, 70), (50, 50), (62, 16)])
def test_any_shape_is_squashed(size):
    assert numbers(clips.decode(video(4, size=size), 4, "uniform", SIDE)) == [0, 1, 2, 3]
    odd = video(4, "matroska", "mjpeg", size=(size[0] + 1, size[1] + 1))
    assert numbers(clips.decode(odd, 4, "uniform", SIDE)) == [0, 1, 2, 3]


def test_frames_are_counted_whatever_their_times():
    times = [0, 1, 2, 10, 11, 40, 41, 42, 90, 300]
    assert numbers(clips.decode(video(10, times=times), 5, "uniform", SIDE)) == [0, 2, 4, 6, 8]


def test_a_short_clip_repeats_its_last_frame():
    assert numbers(clips.decode(video(1), 4, "headtail", SIDE, np.random.default_rng(0))) == [0, 0, 0, 0]
    assert numbers(clips.decode(video(3), 5, "uniform", SIDE)) == [0, 1, 2, 2, 2]


def test_sound_does_not_matter():
    assert numbers(clips.decode(video(8, audio=True), 4, "uniform", SIDE)) == [0, 2, 4, 6]


def turned(data: bytes) -> bytes:
    """With the matrix of a phone that was held upright: the picture is shown turned to the right by 90 degrees."""
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    right = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    track = data.index(b"tkhd")
    place = data.index(identity, track)
    return data[:place] + right + data[place + len(right) :]


def test_rotation_is_applied():
    data = video(2)
    before, after = clips.decode(data, 2, "uniform", SIDE), clips.decode(turned(data), 2, "uniform", SIDE)
    np.testing.assert_array_equal(after, np.rot90(before, -1, axes=(1, 2)))


@pytest.mark.parametrize(
    ("container", "codec", "pixels"),
    [
        ("mp4", "libx264", "yuv420p10le"),
        ("mp4", "libx265", "yuv420p10le"),
        ("mov", "prores_ks", "yuv422p10le"),
        ("mp4", "libx264", "yuv444p"),
    ],
)
def test_more_bits_and_full_colour(container, codec, pixels):
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    data = video(24, container, codec, pixels=pixels, **options)
    assert clips.header(data)[0] == {"libx264": "h264", "libx265": "hevc", "prores_ks": "prores"}[codec]
    assert numbers(clips.decode(data, 4, "uniform", SIDE)) == [0, 6, 12, 18]


# Groups of 12 frames that refer to the one before (open), whose leading frames need it.
OPEN = "keyint=12:min-keyint=12:scenecut=0:open-gop=1:bframes=2:b-adapt=0"
CUT = [
    ("mpegts", "libx264", {"x264-params": OPEN}),
    ("matroska", "libx264", {"x264-params": OPEN}),
    ("matroska", "libx265", {"x265-params": f"log-level=none:{OPEN}"}),
    ("mpegts", "mpeg2video", {"sc_threshold": "1000000000"}),
    ("matroska", "mpeg4", {"sc_threshold": "1000000000"}),
]


@pytest.mark.parametrize("after", [0, 3], ids=["at a keyframe", "between keyframes"])
@pytest.mark.parametrize(("container", "codec", "options"), CUT)
def test_a_stream_cut_out_of_a_longer_one_begins_at_its_first_keyframe(container, codec, options, after):
    """It begins with packets that refer to what is gone. MPEG-4's decoder makes grey noise of them."""
    options = dict(container=container, codec=codec, gop=12, b_frames=2, **options)
    with av.open(io.BytesIO(video(36, **options))) as file:
        packets = [packet for packet in file.demux(file.streams.video[0]) if packet.size]
    keys = [place for place, packet in enumerate(packets) if packet.is_keyframe]
    assert any(packet.pts < packets[keys[1]].pts for packet in packets[keys[1] :])  # leading frames
    cut = video(36, drop=keys[1] - after, **options)
    assert numbers(clips.decode(cut, 24, "uniform", SIDE)) == list(range(12, 36))
    assert numbers(clips.decode(cut, 4, "uniform", SIDE)) == [12, 18, 24, 30]


def test_a_stream_without_a_keyframe_is_refused():
    data = video(24, "matroska", "mpeg4", gop=100, drop=3, sc_threshold="1000000000")
    with pytest.raises(OSError, match="the video has no keyframe, so none of its frames can be decoded"):
        clips.decode(data, 4, "uniform", SIDE)


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
def test_a_stream_without_frames_is_refused(container):
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        file.start_encoding()
    with pytest.raises(OSError, match=r"no frames|no video stream|not a readable"):
        clips.decode(out.getvalue(), 4, "uniform", SIDE)


def test_reasons_of_videos_that_cannot_be_used(monkeypatch):
    """As the log counts them."""
    whole = video(24)
    cases = {
        video(0, audio=True): "not a picture",
        whole[:-500]: "truncated",
        video(24, "matroska", "mpeg4", gop=100, drop=3, sc_threshold="1000000000"): "truncated",
    }
    for data, expected in cases.items():
        with pytest.raises(OSError) as raised:
            clips.decode(data, 4, "uniform", SIDE)
        assert reason(raised.value) == expected
    for limit, value in (("MAX_PIXELS", 64 * 48 - 1), ("MAX_BYTES", 10)):
        with monkeypatch.context() as patch:
            patch.setattr(transforms, limit, value)
            with pytest.raises(OSError) as raised:
                clips.decode(whole, 4, "uniform", SIDE)
        assert reason(raised.value) == "too large"


class Videos:
    """A source of videos, as a prepared one gives them."""

    def __init__(self, *data):
        self._data = data

    def __len__(self):
        return len(self._data)

    def __getitem__(self, index):
        return {"image": self._data[index], "caption": "a", "references": ["a"], "id": str(index)}


def test_statistics_and_batches_count_odd_videos():
    """Whole, in 10 bits, of one frame, at variable times, without pictures, cut: the last two cannot be used."""
    rotated = turned(video(4))
    odd = [video(4), video(4, pixels="yuv420p10le"), video(1), video(4, times=[0, 1, 50, 51]), rotated]
    source = Videos(*odd, video(0, audio=True), video(24)[:-500])
    text = CaptionText(character_tokenizer(), start_id=1, end_id=2, pad_id=0, max_tokens=8, start_is_target=False)
    found = describe(source, text, videos=True)
    assert [picture[:3] for picture in found.pictures] == [("h264", 64, 48)] * 5
    assert [picture.bytes for picture in found.pictures] == [len(data) for data in odd]
    assert found.dead == {"not a picture": 1, "truncated": 1}
    spec = BatchSpec(Pictures(SIDE, 2), {"caption": TextSpec(8, True, lambda: text)})
    (batch,) = make_eval_batches(source, spec, batch_size=8)
    assert batch["index"].tolist() == [*range(7), -1]
    reasons = [REASONS[code - 1] if code else "" for code in batch["skipped"]]
    assert reasons == ["", "", "", "", "", "not a picture", "truncated", ""]
    assert batch["weight"].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert [numbers(clip) for clip in batch["image"][:4]] == [[0, 2], [0, 2], [0, 0], [0, 2]]
    np.testing.assert_array_equal(batch["image"][4], np.rot90(batch["image"][0], -1, axes=(1, 2)))


@pytest.mark.parametrize(("container", "codec"), [("avi", "mjpeg"), ("mp4", "mpeg4"), ("mp4", "libx264")])
def test_reduced_frames_show_the_same(container, codec):
    data = video(8, container, codec, size=(256, 192))
    full, reduced = (clips.decode(data, 4, "uniform", SIDE, reduced=on) for on in (False, True))
    assert numbers(reduced) == [0, 2, 4, 6]
    difference = np.abs(full.astype(int) - reduced)
    assert difference.mean() < 4 and (difference.any() or codec == "libx264")


def test_a_clip_has_one_crop_and_one_flip():
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for seed in range(8):
        view = clips.augment_clip(np.stack([frame] * 3), 24, (0.3, 1.0), True, np.random.default_rng(seed))
        expected = transforms.augment(frame, 24, (0.3, 1.0), True, np.random.default_rng(seed))
        assert view.shape == (3, 24, 24, 3) and view.dtype == np.uint8
        for each in view:
            np.testing.assert_array_equal(each, expected)


def test_what_is_no_video_is_refused(monkeypatch, tmp_path):
    path = tmp_path / "index_first.mp4"
    with av.open(path, "w", options={"movflags": "faststart"}) as copy, av.open(io.BytesIO(video(24))) as file:
        stream = copy.add_stream_from_template(file.streams.video[0])
        for packet in file.demux(file.streams.video[0]):
            if packet.size:
                packet.stream = stream
                copy.mux(packet)
    whole = path.read_bytes()
    cases = {
        b"": "not a readable video",
        b"not a video": "not a readable video",
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n": "not a readable video",
        b"ffconcat version 1.0\nfile /etc/hostname\n": "not a readable video",
        whole[: len(whole) - 300]: "cut off",
        video(24)[:-500]: "not a readable video",
        video(0, audio=True): "no video stream",
    }
    for data, message in cases.items():
        with pytest.raises(transforms.UNREADABLE, match=message):
            clips.decode(data, 4, "uniform", SIDE)
    monkeypatch.setattr(transforms, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(OSError, match="64 x 48 pixels are more than the limit"):
        clips.decode(whole, 4, "uniform", SIDE)
    monkeypatch.setattr(transforms, "MAX_BYTES", 10)
    with pytest.raises(OSError, match="more than the limit of 10"):
        clips.decode(whole, 4, "uniform", SIDE)


SIZED = [one for one in FORMATS if one[0] in ("matroska", "webm", "avi")]


def index_of(container: str, data: bytes) -> int:
    """Where the index begins, behind the last frame."""
    return data.rindex(b"idx1" if container == "avi" else b"\x1c\x53\xbb\x6b")


@pytest.mark.parametrize("times", [None, [0, 1, 2, 50, *range(60, 80)]], ids=["regular", "variable"])
@pytest.mark.parametrize(("container", "codec"), SIZED)
def test_cut_files_are_refused_and_whole_ones_are_not(container, codec, times):
    whole = video(24, container, codec, times=times, audio=container == "matroska")
    frames = clips.decode(whole, 4, "uniform", SIDE)
    index = index_of(container, whole)
    for cut in (index // 2, index * 3 // 4, index * 9 // 10):
        with pytest.raises(OSError, match=rf"cut off: it has {cut:,} of {len(whole):,} bytes|no frames|not a readable"):
            clips.decode(whole[:cut], 4, "uniform", SIDE)
    longer = whole + b"x" * 100
    np.testing.assert_array_equal(clips.decode(longer, 4, "uniform", SIDE), frames)


@pytest.mark.parametrize(("container", "codec"), SIZED)
def test_files_that_lack_their_index_only_are_whole(container, codec):
    whole = video(24, container, codec)
    cut = whole[: index_of(container, whole)]
    assert numbers(clips.decode(cut, 4, "uniform", SIDE)) == [0, 6, 12, 18]


@pytest.mark.parametrize("container", ["matroska", "avi"])
def test_streamed_files_do_not_say_their_size(container):
    whole = bytearray(video(24, container, "mpeg4"))
    if container == "avi":
        whole[4:8] = bytes(4)
    else:
        place = whole.index(containers.SEGMENT) + 4
        whole[place : place + 8] = b"\x01" + b"\xff" * 7
    assert containers.declared_size(bytes(whole)) is None
    clips.decode(bytes(whole[: len(whole) * 3 // 4]), 4, "uniform", SIDE)


def test_sizes_that_files_declare():
    assert containers.declared_size(b"RIFF\x05\0\0\0AVI xx" + b"RIFF\x04\0\0\0AVIX") == 14 + 12
    assert containers.declared_size(containers.EBML + b"\x82ab" + containers.SEGMENT + b"\x40\x05") == 7 + 6 + 5
    for other in (b"", b"RIFF", containers.EBML, containers.EBML + b"\x00", containers.EBML + b"\x80\x18", b"\0" * 20):
        assert containers.declared_size(other) is None


def test_a_tag_that_is_not_utf8_does_not_matter():
    whole = video(24)
    place = whole.index(b"Lavf")  # the name of the muxer, which is a tag
    damaged = whole[:place] + b"\xc3\x28" + whole[place + 2 :]
    with pytest.raises(UnicodeDecodeError):
        av.open(io.BytesIO(damaged))
    np.testing.assert_array_equal(*(clips.decode(data, 4, "uniform", SIDE) for data in (whole, damaged)))


@pytest.mark.parametrize(("container", "codec"), FORMATS)
def test_damaged_videos_are_decoded_or_refused(container, codec):
    """50 of each format: changed bytes, a cut, or both. A decoder that hangs fails the test by its time limit."""
    data = video(12, container, codec)
    rng = np.random.default_rng(0)
    refused = 0
    for case in range(50):
        damaged = bytearray(data)
        if case % 3:
            for place in rng.integers(0, min(len(data), 800) if case % 2 else len(data), rng.integers(1, 12)):
                damaged[place] = rng.integers(256)
        if case % 3 != 1:
            damaged = damaged[: rng.integers(len(damaged))]
        began = time.monotonic()
        try:
            frames = clips.decode(bytes(damaged), 4, "uniform", SIDE)
            assert frames.shape == (4, SIDE, SIDE, 3)
        except transforms.UNREADABLE:
            refused += 1
        assert time.monotonic() - began < 60  # a hang, not a measurement
    assert 0 < refused < 50
