"""Decoding and the image processors."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from simvlg_jax.data import transforms


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def transparent(mode: str) -> Image.Image:
    """A red left half, a transparent right half (black underneath)."""
    picture = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 4, 4))
    return picture.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_becomes_white(mode):
    if mode == "P":
        picture = Image.new("P", (8, 4), 1)
        picture.putpalette([255, 0, 0, 0, 0, 0])
        picture.paste(0, (0, 0, 4, 4))
        data = encoded(picture, transparency=1)
    else:
        data = encoded(transparent(mode))
    result = transforms.decode(data)
    assert result.mode == "RGB"
    assert result.getpixel((7, 0)) == (255, 255, 255)
    assert result.getpixel((0, 0)) != (255, 255, 255)


def test_half_transparent_is_blended_with_white():
    data = encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 128)))
    assert transforms.decode(data).getpixel((0, 0)) == (127, 127, 127)


def test_sixteen_bit_grey_keeps_its_shades():
    data = encoded(Image.fromarray(np.array([[0, 128 << 8, 255 << 8]], np.uint16)))
    assert [transforms.decode(data).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_camera_orientation_is_applied():
    picture = Image.new("RGB", (6, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    assert transforms.decode(encoded(picture, "JPEG", exif=exif)).size == (2, 6)


def test_arrays_and_bytes_give_the_same_picture():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    from_bytes = transforms.decode(encoded(Image.fromarray(pixels)))
    np.testing.assert_array_equal(np.asarray(from_bytes), pixels)
    np.testing.assert_array_equal(np.asarray(transforms.decode(pixels)), pixels)


@pytest.mark.parametrize("damage", [b"", b"not a picture", "cut", "flipped"])
def test_damaged_files_raise_what_callers_catch(damage):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise))
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        middle = len(data) // 2
        data = data[:middle] + bytes(255 - byte for byte in data[middle : middle + 40]) + data[middle + 40 :]
    else:
        data = damage
    with pytest.raises(transforms.UNREADABLE):
        transforms.decode(data)


sides = st.integers(1, 400)


@given(sides, sides, st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)).map(sorted), st.integers(0, 2**32))
def test_crops_lie_inside_and_keep_area_and_shape(width, height, scale, seed):
    left, top, right, bottom = transforms.crop_box(width, height, scale, np.random.default_rng(seed))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    w, h = right - left, bottom - top
    # Rounding moves each side by half a pixel.
    low, high = transforms.RATIO
    if min(w, h) > 1 and (w, h) != (width, height):
        assert (w - 1) / (h + 1) <= high and (w + 1) / (h - 1) >= low
        if low <= width / height <= high:
            assert (w - 1) * (h - 1) <= scale[1] * width * height


def test_area_of_crops_is_uniform():
    rng = np.random.default_rng(0)
    boxes = [transforms.crop_box(1000, 1000, (0.1, 0.5), rng) for _ in range(4000)]
    areas = np.array([(right - left) * (bottom - top) / 1e6 for left, top, right, bottom in boxes])
    # Mean and deviation of U(0.1, 0.5).
    assert abs(areas.mean() - 0.3) < 0.01
    assert abs(areas.std() - 0.4 / 12**0.5) < 0.01


@pytest.mark.parametrize(("size", "box"), [((1000, 30), (480, 0, 520, 30)), ((30, 1000), (0, 480, 30, 520))])
def test_very_long_pictures_fall_back_to_the_centre(size, box):
    assert transforms.crop_box(*size, (1.0, 1.0), np.random.default_rng(0)) == box


def test_augment_flips_half_of_the_pictures_only_if_asked():
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, 16:] = 255  # white on the right
    picture = Image.fromarray(pixels)

    def white_left(flip):
        rng = np.random.default_rng(0)
        views = [transforms.augment(picture, 16, (0.9, 1.0), flip, rng) for _ in range(200)]
        assert all(view.shape == (16, 16, 3) and view.dtype == np.uint8 for view in views)
        return np.mean([view[8, 0, 0] > 128 for view in views])

    assert white_left(flip=False) == 0
    assert 0.35 < white_left(flip=True) < 0.65


def test_squash_keeps_everything_whatever_the_shape():
    pixels = np.zeros((10, 40, 3), np.uint8)
    pixels[:, 20:] = 255
    view = transforms.squash(Image.fromarray(pixels), 8)
    assert view.shape == (8, 8, 3)
    assert (view[:, :3] < 30).all() and (view[:, 5:] > 225).all()
