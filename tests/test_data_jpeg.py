"""JPEGs decoded without Pillow: the same pixels, and the same files refused."""

import io
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from simvlg_jax.data import transforms
from simvlg_jax.data.jpeg import FACTORS, Jpeg


def encoded(width=40, height=30, seed=0, mode="RGB", orientation=None, **options) -> bytes:
    """A JPEG of soft noise."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(1, height // 4), max(1, width // 4), 3), dtype=np.uint8)
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    out = io.BytesIO()
    Image.fromarray(small).resize((width, height)).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


jpegs = st.builds(
    encoded,
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    seed=st.integers(0, 2**32),
    mode=st.sampled_from(["RGB", "RGB", "L", "CMYK"]),
    orientation=st.sampled_from([None, *range(10)]),
    quality=st.integers(1, 100),
    subsampling=st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    progressive=st.booleans(),
    optimize=st.booleans(),
    restart_marker_blocks=st.integers(0, 5),
)


def pillows(data: bytes) -> np.ndarray | None:
    """What Pillow alone gives; None if it refuses."""
    try:
        return np.asarray(transforms.decode(data))
    except transforms.UNREADABLE:
        return None


def assert_same(data: bytes) -> bool:
    """Compares with Pillow; returns whether the fast decoder was used."""
    jpeg = Jpeg.parse(data)
    fast = jpeg and jpeg.decode(1)
    expected = pillows(data)
    if expected is None:
        assert fast is None
        with pytest.raises(transforms.UNREADABLE):
            transforms.pixels(data)
    else:
        np.testing.assert_array_equal(transforms.pixels(data), expected)
        if jpeg:
            assert jpeg.size == (expected.shape[1], expected.shape[0])
    return fast is not None


@settings(max_examples=300, deadline=None)
@given(jpegs)
def test_every_kind_has_pillows_pixels(data):
    assert_same(data)


@settings(max_examples=400, deadline=None)
@given(jpegs, st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4), st.floats(0, 1))
@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Tag data larger")
def test_damaged_files_are_refused_when_pillow_refuses_them(data, changes, share):
    mutated = bytearray(data)
    for place, value in changes:
        mutated[int(place * len(data))] = value
    cut = mutated if share < 0.5 else mutated[: int(share * len(data))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(bytes(cut))


@pytest.mark.parametrize("tail", [b"", b"\0" * 50, bytes(range(256))])
def test_ordinary_files_are_decoded_without_pillow(tail):
    for options in ({}, {"mode": "L"}, {"progressive": True}, {"orientation": 6}, {"restart_marker_blocks": 2}):
        assert assert_same(encoded(**options) + tail), options
    assert not assert_same(encoded(mode="CMYK"))
    whole = encoded(200, 160)
    damaged = whole[:-300] + b"\xff\xd9"
    assert not assert_same(damaged) and pillows(damaged) is not None  # Pillow fills the rest with grey
    assert not assert_same(encoded()[:-2]) and pillows(encoded()[:-2]) is None


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("orientation", [1, 6, 7])
def test_reduced_pictures_are_pillows_drafts(factor, orientation):
    for width, height in ((64, 48), (61, 35), (33, 79)):
        data = encoded(width, height, orientation=orientation)
        with Image.open(io.BytesIO(data)) as picture:
            picture.draft(None, (width // factor, height // factor))
            expected = np.asarray(ImageOps.exif_transpose(picture))
        np.testing.assert_array_equal(Jpeg.parse(data).decode(factor), expected)


def test_other_libraries_decode_with_pillow_alone(monkeypatch):
    monkeypatch.setattr("simvlg_jax.data.jpeg._same_decoder", lambda: False)
    data = encoded()
    assert Jpeg.parse(data) is None
    np.testing.assert_array_equal(transforms.pixels(data), pillows(data))


def test_limits_are_those_of_decode(monkeypatch):
    data = encoded(96, 64)
    monkeypatch.setattr(transforms, "MAX_PIXELS", 96 * 64 - 1)
    assert transforms.pixels(data).shape == (32, 48, 3)
    monkeypatch.setattr(transforms, "MAX_BYTES", len(data) - 1)
    with pytest.raises(OSError, match="more than the limit"):
        transforms.pixels(data)
