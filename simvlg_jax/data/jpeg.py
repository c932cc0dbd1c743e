"""Decodes ordinary JPEGs with libjpeg-turbo directly, to the bytes that Pillow gives but without its copies.

Pillow decodes with libjpeg-turbo too. It still reads every header, so that the same files are refused, and it decodes
whatever is unusual or damaged.
"""

import functools
import io
from collections.abc import Callable
from typing import NamedTuple, Self

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, features

# EXIF orientation -> what makes the picture (H, W, 3) upright, a view of it.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}
FACTORS = (8, 4, 2, 1)  # by which libjpeg-turbo can reduce a picture, the largest first


class Jpeg(NamedTuple):
    """The header of a grey or colour JPEG.

    Attributes:
      data: the whole file.
      stored: width and height before `orientation` is applied.
      orientation: EXIF's, 1 to 8.
    """

    data: bytes
    stored: tuple[int, int]
    orientation: int

    @classmethod
    def parse(cls, data: bytes) -> Self | None:
        """Returns None for all that only Pillow can decode, or has to refuse."""
        if not data.startswith(b"\xff\xd8") or not _same_decoder():
            return None
        try:
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as picture:
                if picture.format != "JPEG" or picture.mode not in ("L", "RGB"):
                    return None
                orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
                return cls(data, picture.size, orientation if orientation in _UPRIGHT else 1)
        except Exception:  # Pillow's errors are of many types; `transforms.decode` raises the same one again
            return None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the upright picture."""
        return self.stored[::-1] if self.orientation >= 5 else self.stored

    def decode(self, factor: int) -> np.ndarray | None:
        """The upright picture at 1/`factor` of its size, rounded up: uint8 (H, W, 3). None if it is damaged."""
        width, height = (-(-side // factor) for side in self.stored)
        try:
            pixels = simplejpeg.decode_jpeg(
                self.data, "RGB", min_width=width, min_height=height, min_factor=factor, strict=True
            )
        except (ValueError, RuntimeError, MemoryError):
            return None
        if pixels.shape != (height, width, 3):
            return None
        return np.ascontiguousarray(_UPRIGHT[self.orientation](pixels)) if self.orientation > 1 else pixels


@functools.cache
def _same_decoder() -> bool:
    """Other libraries than libjpeg-turbo, which a Pillow built from source may use, give other bytes."""
    return features.check_feature("libjpeg_turbo")
