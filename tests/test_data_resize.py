"""Bicubic resizing equals Pillow's byte for byte."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from simvlg_jax.data import resize


def noise(width: int, height: int, seed: int, contrast: bool = False) -> np.ndarray:
    """Random pixels; with `contrast` all channels are 0 or 255, so that the weights' overshoot is cut off."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return (pixels > 127).astype(np.uint8) * 255 if contrast else pixels


def pillow(pixels, crop, size, flip=False, box=None):
    resized = np.asarray(Image.fromarray(pixels).crop(crop).resize((size, size), Image.Resampling.BICUBIC, box))
    return resized[:, ::-1] if flip else resized


@st.composite
def crops(draw, longest=300):
    """(width, height, crop within them)."""
    width, height = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return width, height, (left, top, draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height)))


@settings(max_examples=300, deadline=None)
@given(crops(), st.integers(1, 120), st.booleans(), st.booleans(), st.integers(0, 2**32))
def test_every_pixel_is_pillows(case, size, flip, contrast, seed):
    width, height, crop = case
    pixels = noise(width, height, seed, contrast)
    np.testing.assert_array_equal(resize.bicubic(pixels, crop, size, flip=flip), pillow(pixels, crop, size, flip))


@settings(max_examples=100, deadline=None)
@given(crops(), st.integers(1, 60), st.tuples(*[st.floats(0, 0.45)] * 4), st.integers(0, 2**32))
def test_boxes_between_pixels_are_pillows(case, size, margins, seed):
    width, height, crop = case
    pixels = noise(width, height, seed)
    w, h = crop[2] - crop[0], crop[3] - crop[1]
    box = (margins[0] * w, margins[1] * h, w - margins[2] * w, h - margins[3] * h)
    np.testing.assert_array_equal(resize.bicubic(pixels, crop, size, box=box), pillow(pixels, crop, size, box=box))


@pytest.mark.parametrize("width", [16, 30, 50])
def test_order_of_rows_and_columns_changes_where_pillows_does(width):
    size = 20
    heights = range(2 * width - size - 3, 2 * width - size + 4)
    for height in [*heights, size - 1, size, size + 1]:
        pixels = noise(width, height, height, contrast=True)
        crop = (0, 0, width, height)
        np.testing.assert_array_equal(resize.bicubic(pixels, crop, size), pillow(pixels, crop, size))


@pytest.mark.parametrize("shape", [(1, resize.LONGEST + 1), (resize.LONGEST + 1, 2), (resize.LONGEST, 1)])
def test_very_long_pictures(shape):
    pixels = noise(*shape, seed=0)
    crop = (0, 0, *shape)
    np.testing.assert_array_equal(resize.bicubic(pixels, crop, 5, flip=True), pillow(pixels, crop, 5, flip=True))


def test_pixels_outside_the_crop_and_strides_do_not_matter():
    pixels = noise(40, 30, 0)
    inside = pixels[5:25, 10:35]
    expected = resize.bicubic(np.ascontiguousarray(inside), (0, 0, 25, 20), 16)
    np.testing.assert_array_equal(resize.bicubic(pixels, (10, 5, 35, 25), 16), expected)
    np.testing.assert_array_equal(resize.bicubic(inside, (0, 0, 25, 20), 16), expected)


def test_loops_are_compiled_where_no_cache_can_be_written(tmp_path):
    """The folders of the package and of the user are those of an image that is mounted read-only."""
    code = (
        "import numba.core.caching as c\n"
        "c.CacheImpl._locator_classes = []\n"
        "import numpy as np\n"
        "from simvlg_jax.data.resize import bicubic\n"
        "print(bicubic(np.full((4, 4, 3), 7, np.uint8), (0, 0, 4, 4), 2).ravel().tolist())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert run.stdout.split() == str([7] * 12).split()
