"""Pictures: decoding, and the published image processors (all on PIL, uint8 in and out).

Normalisation is not here: it runs on the device.
"""

import io
import math
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

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
RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10


def decode(image: bytes | np.ndarray) -> Image.Image:
    """Encoded bytes, or uint8 (H, W, 3), to an upright RGB picture; what is transparent becomes white.

    Raises one of UNREADABLE if the bytes are no picture.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image, "RGB") if image.ndim == 3 else Image.fromarray(image).convert("RGB")
    try:
        with Image.open(io.BytesIO(image)) as opened:
            picture = ImageOps.exif_transpose(opened)
    except UnidentifiedImageError:
        raise UnidentifiedImageError("not a picture of a known format") from None  # Pillow names the buffer instead
    if picture.mode.startswith("I;16"):  # convert() would clip 16-bit grey to white
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


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
