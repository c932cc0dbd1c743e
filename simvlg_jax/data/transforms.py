"""Decodes pictures and applies the published image processors, in uint8 and with the bytes that Pillow gives.

Ordinary JPEGs are decoded and all pictures are resized without Pillow, by `jpeg` and `resize`, which are faster.
Normalisation runs on the device instead.
"""

import errno
import functools
import io
import math
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from simvlg_jax.data.jpeg import FACTORS, Jpeg

# Errors that Pillow raises for damaged files.
UNREADABLE = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
MAX_PIXELS = 50 * 2**20  # of a decoded picture: 4 bytes each, and up to five times that during decoding
MAX_BYTES = 2**28  # of a picture's file
BAND = 2**20  # pixels converted at a time
# The raster formats of Pillow. Others are unsafe: EPS, for example, runs a program.
FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "AVIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "TGA")
RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10

# MAX_PIXELS is below Pillow's own limit, whose warning is therefore redundant.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read(path: Path) -> bytes:
    """Reads a picture's file for `decode`. Raises OSError if it is absent or larger than MAX_BYTES."""
    _check_bytes(path.stat().st_size)
    return path.read_bytes()


def decode(image: bytes | np.ndarray) -> Image.Image:
    """Decodes encoded bytes, or wraps uint8 (H, W, 3), as an upright RGB picture on white.

    16-bit grey keeps its upper 8 bits. Files do not name the full scale of 32-bit grey. It is assumed to be the
    smallest of 1 (floats only), 255, 65535, 2^31 - 1 and 2^32 - 1 that is not below the largest finite value. NaN and
    negative values become black, infinity becomes white.

    A JPEG with more than MAX_PIXELS is decoded at 1/2, 1/4 or 1/8 of its size. Other pictures of that size are refused
    before decoding; so are progressive JPEGs, whose decoder always needs the memory of the full size.

    Raises one of UNREADABLE if the bytes are not a picture, or if it is too large.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image, "RGB") if image.ndim == 3 else Image.fromarray(image).convert("RGB")
    _check_bytes(len(image))
    try:
        with Image.open(io.BytesIO(image), formats=_formats()) as picture:
            _fit(picture)
            ImageOps.exif_transpose(picture, in_place=True)
    except UnidentifiedImageError:
        raise UnidentifiedImageError("not a picture of a known format") from None  # Pillow's message names the buffer
    # convert() would clip more than 8 bits of grey to white.
    if picture.mode.startswith("I;16"):
        return _in_bands(picture, lambda band: Image.fromarray((np.asarray(band) >> 8).astype(np.uint8)))
    if picture.mode == "I":
        return _from_int32(picture)
    if picture.mode == "F":
        return _from_float32(picture)
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        return _in_bands(picture, _on_white)
    if picture.mode == "RGB" and picture.format in ("JPEG", "PNG"):
        return picture  # convert() would copy it; for other formats, the copy releases the decoder
    return picture.convert("RGB")


def pixels(image: bytes | np.ndarray) -> np.ndarray:
    """The picture of `decode` as uint8 (H, W, 3). Raises what `decode` raises."""
    if isinstance(image, np.ndarray):
        return image if image.ndim == 3 else np.asarray(decode(image))
    jpeg = _jpeg(image)
    decoded = jpeg and jpeg.decode(1)
    return np.asarray(decode(image)) if decoded is None else decoded


def _jpeg(data: bytes) -> Jpeg | None:
    """The header of a JPEG that `decode` would not make smaller."""
    jpeg = Jpeg.parse(data) if len(data) <= MAX_BYTES else None
    return jpeg if jpeg and math.prod(jpeg.size) <= MAX_PIXELS else None


@functools.cache
def _formats() -> tuple[str, ...]:
    """The FORMATS that this build of Pillow supports."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_bytes(count: int) -> None:
    if count > MAX_BYTES:
        raise OSError(errno.EFBIG, f"the file has {count:,} bytes, more than the limit of {MAX_BYTES:,}")


def _fit(picture: Image.Image) -> None:
    """Makes Pillow decode a picture at a scale within MAX_PIXELS; raises DecompressionBombError if it cannot."""
    width, height = picture.size
    scale = next((s for s in (1, 2, 4, 8) if -(-width // s) * -(-height // s) <= MAX_PIXELS), 8)
    if scale > 1 and not picture.info.get("progressive"):
        picture.draft(None, (width // scale, height // scale))
    if picture.width * picture.height > MAX_PIXELS:
        raise Image.DecompressionBombError(
            f"{width} x {height} pixels are more than the limit of {MAX_PIXELS:,}; scale the picture down"
        )


def _bands(picture: Image.Image) -> Iterator[tuple[tuple[int, int, int, int], Image.Image]]:
    """Yields (box, band) for horizontal bands of about BAND pixels."""
    rows = max(1, BAND // max(1, picture.width))
    for top in range(0, picture.height, rows):
        box = (0, top, picture.width, min(top + rows, picture.height))
        yield box, picture.crop(box)


def _in_bands(picture: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Converts a picture to RGB band by band, which avoids several copies of the whole picture in memory."""
    result = Image.new("RGB", picture.size)
    for box, band in _bands(picture):
        result.paste(convert(band).convert("RGB"), box)
    return result


def _on_white(picture: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))


def _from_int32(picture: Image.Image) -> Image.Image:
    """Converts mode "I" to RGB, see `decode`."""
    # TIFF's samples are unsigned (1) by default, but Pillow reads their bits as int32.
    tiff = isinstance(picture, TiffImagePlugin.TiffImageFile)
    unsigned = tiff and picture.tag_v2.get(TiffImagePlugin.SAMPLEFORMAT, (1,)) == (1,)

    def values(band: Image.Image) -> np.ndarray:
        return np.asarray(band).view(np.uint32) if unsigned else np.maximum(np.asarray(band), 0)

    largest = max(int(values(band).max(initial=0)) for _, band in _bands(picture))
    shift = next(bits for bits in (8, 16, 31, 32) if largest < 2**bits) - 8
    return _in_bands(picture, lambda band: Image.fromarray((values(band) >> shift).astype(np.uint8)))


def _from_float32(picture: Image.Image) -> Image.Image:
    """Converts mode "F" to RGB, see `decode`."""

    def values(band: Image.Image) -> np.ndarray:
        return np.nan_to_num(np.asarray(band), nan=0, posinf=np.inf, neginf=0).clip(min=0)

    largest = max(v[np.isfinite(v)].max(initial=0) for v in (values(band) for _, band in _bands(picture)))
    scales = (np.float32(scale) for scale in (1, 255, 65535, 2**31 - 1, 2**32 - 1))
    scale = next((scale for scale in scales if largest <= scale), largest)
    return _in_bands(
        picture, lambda band: Image.fromarray(np.rint(values(band).clip(max=scale) * (255 / scale)).astype(np.uint8))
    )


def crop_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draws a random crop like torchvision's RandomResizedCrop: (left, top, right, bottom) in pixels.

    Args:
      scale: minimum and maximum share of the picture's area.
    """
    for _ in range(ATTEMPTS):
        area = rng.uniform(*scale) * width * height
        aspect = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    # No draw fits very long pictures: take the largest centred crop with an allowed aspect ratio.
    w = min(width, round(height * RATIO[1]))
    h = min(height, round(width / RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def augment(
    picture: np.ndarray | Image.Image, size: int, scale: tuple[float, float], flip: bool, rng: np.random.Generator
) -> np.ndarray:
    """Training view: a random crop with bicubic resizing, mirrored with probability 1/2 if `flip`.

    Args:
      picture: uint8 (H, W, 3), or a picture in mode RGB.

    Returns uint8 (size, size, 3).
    """
    picture = np.asarray(picture)
    height, width, _ = picture.shape
    crop = crop_box(width, height, scale, rng)
    return _resize()(picture, crop, size, flip=flip and rng.random() < 0.5)


def view(
    image: bytes | np.ndarray,
    size: int,
    scale: tuple[float, float],
    flip: bool,
    rng: np.random.Generator,
    *,
    reduced: bool = False,
) -> np.ndarray:
    """Decodes a picture and takes the training view of it; the draws from `rng` are those of `augment`.

    Args:
      reduced: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the crop then still has `size` pixels in both
        directions. The pixels differ a little from those of the full picture.

    Returns uint8 (size, size, 3). Raises what `decode` raises.
    """
    jpeg = _jpeg(image) if reduced and isinstance(image, bytes) else None
    if jpeg is None:
        return augment(pixels(image), size, scale, flip, rng)
    left, top, right, bottom = crop_box(*jpeg.size, scale, rng)
    mirrored = flip and rng.random() < 0.5
    factor = next((f for f in FACTORS if min(right - left, bottom - top) >= f * size), 1)
    picture = jpeg.decode(factor)
    if picture is None:
        factor, picture = 1, np.asarray(decode(image))
    # In the reduced picture the crop begins and ends between two pixels.
    height, width, _ = picture.shape
    outer = (left // factor, top // factor, min(-(-right // factor), width), min(-(-bottom // factor), height))
    box = (left / factor - outer[0], top / factor - outer[1], right / factor - outer[0], bottom / factor - outer[1])
    return _resize()(picture, outer, size, flip=mirrored, box=box)


def squash(picture: np.ndarray | Image.Image, size: int) -> np.ndarray:
    """Evaluation view: bicubic resizing to a square without keeping the aspect ratio.

    Args:
      picture: uint8 (H, W, 3), or a picture in mode RGB.

    Returns uint8 (size, size, 3).
    """
    picture = np.asarray(picture)
    height, width, _ = picture.shape
    return _resize()(picture, (0, 0, width, height), size)


def _resize() -> Callable[..., np.ndarray]:
    """`resize.bicubic`, which takes half a second to load, and some seconds the first time on a machine."""
    from simvlg_jax.data.resize import bicubic

    return bicubic
