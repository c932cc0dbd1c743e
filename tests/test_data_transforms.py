"""Decoding and the image processors."""

import io
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

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


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        ("f4", [0, 0.5, 1], [0, 128, 255]),
        ("f4", [NAN, 0.2, -3, INF, -INF, 0.4], [0, 51, 0, 255, 0, 102]),
        ("f4", [0, 1.5, 254.6], [0, 2, 255]),
        ("f4", [0, 256, 65535], [0, 1, 255]),
        ("f4", [0, 2**30, 2**31], [0, 128, 255]),
        ("f4", [0, 2**31, 2**32], [0, 128, 255]),
        ("f4", [0, 2.0**100, 2.0**101], [0, 128, 255]),
        ("f4", [NAN, -1, INF], [0, 0, 255]),
        ("i4", [-5, 0, 1, 255], [0, 0, 1, 255]),
        ("i4", [-(2**31), 255, 256, 40000, 65535], [0, 0, 1, 156, 255]),
        ("i4", [0, 65536, 2**30, 2**31 - 1], [0, 0, 128, 255]),
        ("u4", [0, 7, 255], [0, 7, 255]),
        ("u4", [0, 40000], [0, 156]),
        ("u4", [0, 2**30, 2**31, 2**32 - 1], [0, 64, 128, 255]),
    ],
)
def test_32_bit_grey_keeps_its_shades(monkeypatch, dtype, values, expected):
    monkeypatch.setattr(transforms, "BAND", 1)
    array = np.array(values, dtype).reshape(-1, 1)
    data = encoded(Image.fromarray(array.view("i4") if dtype == "u4" else array), "TIFF")
    if dtype == "u4":  # Pillow writes signed integers (2) only: SampleFormat, a short, one of them
        signed, unsigned = (np.array([339, 3, 1, 0, kind, 0], "<u2").tobytes() for kind in (2, 1))
        assert signed in data
        data = data.replace(signed, unsigned)
    assert [transforms.decode(data).getpixel((0, y)) for y in range(len(values))] == [(v, v, v) for v in expected]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16"])
def test_bands_give_what_the_whole_gives(monkeypatch, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (23, 10, 4), dtype=np.uint8)
    if mode == "I;16":
        picture, options = Image.fromarray(pixels.view(np.uint16)[..., 0]), {}
    else:
        picture = Image.fromarray(pixels).convert("RGB" if mode == "P" else "RGBA").convert(mode)
        options = {"transparency": bytes(range(256))} if mode == "P" else {}
    data = encoded(picture, **options)
    whole = transforms.decode(data)
    monkeypatch.setattr(transforms, "BAND", 40)  # 5 bands of 4 rows and one of 3
    np.testing.assert_array_equal(np.asarray(transforms.decode(data)), np.asarray(whole))


def header(width: int, height: int) -> bytes:
    """A PNG file whose pixels are missing."""
    whole = encoded(Image.new("RGBA", (1, 1)))
    start = whole[:16] + width.to_bytes(4) + height.to_bytes(4) + whole[24:29]
    return start + zlib.crc32(start[12:]).to_bytes(4) + whole[33:]


@pytest.mark.parametrize("size", [(9500, 9500), (60_000_000, 1)])
def test_too_many_pixels_are_refused_before_decoding_without_a_warning(size):
    code = "import sys; from simvlg_jax.data import transforms; transforms.decode(sys.stdin.buffer.read())"
    run = subprocess.run([sys.executable, "-c", code], input=header(*size), capture_output=True)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith(b"PIL.Image.DecompressionBombError: ")
    assert b"Warning" not in run.stderr


@pytest.mark.parametrize(("limit", "size"), [(6144, (96, 64)), (6143, (48, 32)), (1535, (24, 16)), (383, (12, 8))])
def test_large_jpegs_are_decoded_smaller(monkeypatch, limit, size):
    picture = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    monkeypatch.setattr(transforms, "MAX_PIXELS", limit)
    result = transforms.decode(encoded(picture, "JPEG", quality=95))
    assert (result.size, result.mode) == (size, "RGB")
    difference = np.asarray(result, int) - np.asarray(picture.resize(size, Image.Resampling.BOX))
    assert abs(difference).max() < 8


@pytest.mark.parametrize(
    ("limit", "kind", "options"),
    [(103, "JPEG", {}), (5999, "JPEG", {"progressive": True}), (5999, "PNG", {}), (5999, "GIF", {})],
)
def test_what_cannot_be_decoded_smaller_is_refused(monkeypatch, limit, kind, options):
    data = encoded(Image.new("RGB", (100, 60)), kind, **options)
    monkeypatch.setattr(transforms, "MAX_PIXELS", limit)
    with pytest.raises(Image.DecompressionBombError, match=f"100 x 60 pixels are more than the limit of {limit:,};"):
        transforms.decode(data)


def test_too_many_bytes_are_refused(monkeypatch, tmp_path):
    data = encoded(Image.new("RGB", (2, 2)))
    (tmp_path / "a.png").write_bytes(data)
    monkeypatch.setattr(transforms, "MAX_BYTES", len(data))
    assert transforms.read(tmp_path / "a.png") == data
    monkeypatch.setattr(transforms, "MAX_BYTES", len(data) - 1)
    for function, argument in ((transforms.decode, data), (transforms.read, tmp_path / "a.png")):
        with pytest.raises(OSError, match=f"the file has {len(data)} bytes, more than"):
            function(argument)


PEAK = """
import io, sys
from pathlib import Path
from PIL import Image, ImageOps
from simvlg_jax.data import transforms
def status(name): return next(int(l.split()[1]) for l in Path("/proc/self/status").open() if l.startswith(name)) * 1024
data = sys.stdin.buffer.read()
Image.open(io.BytesIO(data)).size
before = status("VmRSS")
picture = transforms.decode(data)
print((status("VmHWM") - before) / (4 * picture.width * picture.height))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak there")
@pytest.mark.parametrize(("kind", "mode", "copies"), [("PNG", "RGBA", 2), ("PNG", "RGB", 1), ("JPEG", "RGB", 1)])
def test_decoding_makes_few_copies_of_the_whole(kind, mode, copies):
    data = encoded(Image.new(mode, (4000, 3000), (200, 100, 0, 128)[: len(mode)]), kind)
    peak = subprocess.run([sys.executable, "-c", PEAK], input=data, capture_output=True, check=True).stdout
    assert float(peak) < copies + 0.5


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


def test_formats_that_are_programs_are_not_read():
    """Pillow would hand PostScript to Ghostscript."""
    with pytest.raises(transforms.UNREADABLE, match="not a picture of a known format"):
        transforms.decode(encoded(Image.new("RGB", (8, 8)), "EPS"))
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "TGA", "AVIF"):
        assert transforms.decode(encoded(Image.new("RGB", (8, 8), "white"), kind)).getpixel((4, 4)) == (255,) * 3, kind


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


def pillows_view(picture: Image.Image, size, scale, flip, rng) -> np.ndarray:
    """`augment` with Pillow alone."""
    box = transforms.crop_box(*picture.size, scale, rng)
    crop = picture.crop(box).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(ImageOps.mirror(crop) if flip and rng.random() < 0.5 else crop)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("flip", [True, False])
def test_views_are_pillows_and_draw_the_same_numbers(kind, flip):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        width, height = (int(side) for side in rng.integers(1, 200, 2))
        data = encoded(Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)), kind)
        expected_rng, *rngs = (np.random.default_rng(seed) for _ in range(4))
        expected = pillows_view(transforms.decode(data), 24, (0.3, 1.0), flip, expected_rng)
        views = [
            transforms.augment(transforms.pixels(data), 24, (0.3, 1.0), flip, rngs[0]),
            transforms.augment(transforms.decode(data), 24, (0.3, 1.0), flip, rngs[1]),
            transforms.view(data, 24, (0.3, 1.0), flip, rngs[2]),
        ]
        after = expected_rng.random()
        for view, rng in zip(views, rngs, strict=True):
            np.testing.assert_array_equal(view, expected)
            assert rng.random() == after
        squashed = transforms.decode(data).resize((24, 24), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(transforms.squash(transforms.pixels(data), 24), np.asarray(squashed))


def photo(width: int, height: int) -> Image.Image:
    """Soft colours, different in every part of the picture."""
    small = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("side", "factors"), [(16, {8}), (40, {2, 4}), (100, {1, 2}), (300, {1})])
def test_reduced_views_show_the_same_part_and_keep_size_pixels(monkeypatch, side, factors):
    data = encoded(photo(400, 321), "JPEG", quality=95)
    used, decode = set(), transforms.Jpeg.decode
    monkeypatch.setattr(transforms.Jpeg, "decode", lambda jpeg, factor: used.add(factor) or decode(jpeg, factor))
    for seed in range(12):
        full, reduced = (
            transforms.view(data, side, (0.2, 1.0), True, np.random.default_rng(seed), reduced=reduced)
            for reduced in (False, True)
        )
        difference = np.abs(full.astype(int) - reduced)
        assert reduced.shape == (side, side, 3) and difference.mean() < 1.5 and difference.max() < 40
    assert used - {1} == factors - {1}


def test_reduced_views_of_what_cannot_be_reduced_are_full():
    whole = encoded(photo(200, 160), "JPEG")
    damaged = whole[:-300] + bytes(200) + whole[-100:]  # Pillow fills the rest with grey
    for data in (encoded(photo(200, 160)), damaged, np.asarray(photo(200, 160))):
        full, reduced = (
            transforms.view(data, 16, (0.5, 1.0), True, np.random.default_rng(3), reduced=reduced)
            for reduced in (False, True)
        )
        np.testing.assert_array_equal(full, reduced)
    with pytest.raises(transforms.UNREADABLE):
        transforms.view(whole[:-300], 16, (0.5, 1.0), True, np.random.default_rng(3), reduced=True)
