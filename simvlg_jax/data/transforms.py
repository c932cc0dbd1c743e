"""Pictures: decoding, and the published image processors (all on PIL, uint8 in and out).

Normalisation is not here: it runs on the device.
"""

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

# What Pillow raises on a damaged file, besides OSError.
UNREADABLE = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
MAX_PIXELS = 50 * 2**20  # in a decoded picture: 4 bytes each, and up to five times that while it is decoded
MAX_BYTES = 2**28  # in a picture's file
BAND = 2**20  # pixels that are converted at once
# Of Pillow's formats the ones that hold photographs and drawings as pixels: others run programs, as EPS does.
FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "AVIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "TGA")
RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10

# Pillow's limit is higher than MAX_PIXELS, so it has nothing to add.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read(path: Path) -> bytes:
    """Reads a picture's file, for `decode`. Raises OSError if it is not there or has more than MAX_BYTES."""
    _check_bytes(path.stat().st_size)
    return path.read_bytes()


def decode(image: bytes | np.ndarray) -> Image.Image:
    """Encoded bytes, or uint8 (H, W, 3), to an upright RGB picture; what is transparent becomes white.

    16-bit grey keeps the upper 8 of its bits. 32-bit grey, whose full scale no file names, is taken to have the
    smallest of 1 (for floats only), 255, 65535, 2^31 - 1 and 2^32 - 1 that holds the picture's largest finite value;
    NaN and negative values become black, infinity white.

    A JPEG of more than MAX_PIXELS is decoded at a half, a quarter or an eighth of its size, to fit. Any other picture
    of so many is refused before it is decoded, a progressive JPEG too, which takes the memory of its full size.

    Raises one of UNREADABLE if the bytes are no picture or too large a one.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image, "RGB") if image.ndim == 3 else Image.fromarray(image).convert("RGB")
    _check_bytes(len(image))
    try:
        with Image.open(io.BytesIO(image), formats=_formats()) as picture:
            _fit(picture)
            ImageOps.exif_transpose(picture, in_place=True)
    except UnidentifiedImageError:
        raise UnidentifiedImageError("not a picture of a known format") from None  # Pillow names the buffer instead
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
        return picture  # convert() would copy it; of other formats, the copy leaves a decoder behind
    return picture.convert("RGB")


@functools.cache
def _formats() -> tuple[str, ...]:
    """FORMATS, but for those that this build of Pillow lacks."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_bytes(count: int) -> None:
    if count > MAX_BYTES:
        raise OSError(f"the file has {count:,} bytes, more than the {MAX_BYTES:,} that are read")


def _fit(picture: Image.Image) -> None:
    """Has a picture of more than MAX_PIXELS decoded at a smaller scale; raises DecompressionBombError if it cannot."""
    width, height = picture.size
    scale = next((s for s in (1, 2, 4, 8) if -(-width // s) * -(-height // s) <= MAX_PIXELS), 8)
    if scale > 1 and not picture.info.get("progressive"):
        picture.draft(None, (width // scale, height // scale))
    if picture.width * picture.height > MAX_PIXELS:
        raise Image.DecompressionBombError(
            f"{width} x {height} pixels are more than the {MAX_PIXELS:,} that are decoded; make it smaller"
        )


def _bands(picture: Image.Image) -> Iterator[tuple[tuple[int, int, int, int], Image.Image]]:
    """A picture's horizontal bands of about BAND pixels, each with its box."""
    rows = max(1, BAND // max(1, picture.width))
    for top in range(0, picture.height, rows):
        box = (0, top, picture.width, min(top + rows, picture.height))
        yield box, picture.crop(box)


def _in_bands(picture: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Converts a picture to RGB band by band: the whole at once would take several copies of it."""
    result = Image.new("RGB", picture.size)
    for box, band in _bands(picture):
        result.paste(convert(band).convert("RGB"), box)
    return result


def _on_white(picture: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))


def _from_int32(picture: Image.Image) -> Image.Image:
    """Mode "I" to RGB, see `decode`."""
    # TIFF's samples are unsigned (1) unless it says otherwise; Pillow holds their bits as int32 all the same.
    tiff = isinstance(picture, TiffImagePlugin.TiffImageFile)
    unsigned = tiff and picture.tag_v2.get(TiffImagePlugin.SAMPLEFORMAT, (1,)) == (1,)

    def values(band: Image.Image) -> np.ndarray:
        return np.asarray(band).view(np.uint32) if unsigned else np.maximum(np.asarray(band), 0)

    largest = max(int(values(band).max(initial=0)) for _, band in _bands(picture))
    shift = next(bits for bits in (8, 16, 31, 32) if largest < 2**bits) - 8
    return _in_bands(picture, lambda band: Image.fromarray((values(band) >> shift).astype(np.uint8)))


def _from_float32(picture: Image.Image) -> Image.Image:
    """Mode "F" to RGB, see `decode`."""

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
    """Random crop as torchvision's RandomResizedCrop draws it: (left, top, right, bottom) in pixels.

    Args:
      scale: smallest and largest share of the picture's area.
    """
    for _ in range(ATTEMPTS):
        area = rng.uniform(*scale) * width * height
        aspect = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    # Very long pictures: the largest centred crop whose shape is allowed.
    w = min(width, round(height * RATIO[1]))
    h = min(height, round(width / RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def augment(
    picture: Image.Image, size: int, scale: tuple[float, float], flip: bool, rng: np.random.Generator
) -> np.ndarray:
    """Training view: random resized crop, bicubic, and if `flip` a mirror image half of the time.

    Returns uint8 (size, size, 3).
    """
    crop = picture.crop(crop_box(*picture.size, scale, rng)).resize((size, size), Image.Resampling.BICUBIC)
    if flip and rng.random() < 0.5:
        crop = ImageOps.mirror(crop)
    return np.asarray(crop)


def squash(picture: Image.Image, size: int) -> np.ndarray:
    """Evaluation view: bicubic resize to a square whatever the shape was. Returns uint8 (size, size, 3)."""
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
