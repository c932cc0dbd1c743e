"""Pillow's bicubic resizing of uint8 pictures, byte for byte, with the loops arranged for vector instructions.

Pillow resizes 8-bit pictures in integers: the weights have 22 fractional bits, first one direction is resized and then
the other, and the pixels in between are rounded to 8 bits. Any other order or precision changes some pixels.

Importing this module compiles the loops or reads them from Numba's cache, so others import it at their first picture.
"""

import numba
import numpy as np
import PIL
from numba import types
from PIL import Image

BITS = 22  # of a weight's fraction
# Rows that are resized together. LLVM unrolls shorter loops instead of vectorising them, which takes twice the time.
ROWS = 64
ANY_ORDER = int(PIL.__version__.split(".")[0]) >= 13  # older ones always resize the rows first
LONGEST = 2**14  # longer sides are left to Pillow, since the memory for ROWS rows grows with them

_PIXELS, _SOURCE = (types.Array(types.uint8, ndim, "C", readonly=True) for ndim in (3, 2))
_LINES = types.uint8[:, ::1]
_WEIGHTS = types.Tuple((types.int64[::1], types.int64[::1], types.int32[:, ::1]))


def _compiled(signature):
    """`numba.njit`, with a cache on disk if there is a folder for it."""

    def decorate(function):
        try:
            return numba.njit(signature, nogil=True, cache=True)(function)
        except RuntimeError:  # neither the package nor the user's cache folder can be written
            return numba.njit(signature, nogil=True)(function)

    return decorate


@_compiled(types.float64(types.float64))
def _cubic(x):
    x = abs(x)
    if x < 1.0:
        return ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1
    if x < 2.0:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return 0.0


@_compiled(_WEIGHTS(types.int64, types.float64, types.float64, types.int64))
def _weights(length, start, extent, size):
    """Weights that resize `extent` of a line of `length` pixels, from `start` on, to `size` pixels.

    Returns:
      For each pixel of the result: the first pixel that it depends on (size,), their number (size,) and their weights
      (size, T).
    """
    scale = extent / size
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    inverse = 1.0 / stretch
    firsts = np.empty(size, np.int64)
    counts = np.empty(size, np.int64)
    weights = np.zeros((size, int(np.ceil(support)) * 2 + 1), np.int32)
    values = np.empty(weights.shape[1])
    for i in range(size):
        center = start + (i + 0.5) * scale
        first = max(int(center - support + 0.5), 0)
        count = min(int(center + support + 0.5), length) - first
        total = 0.0
        for k in range(count):
            values[k] = _cubic((k + first - center + 0.5) * inverse)
            total += values[k]
        for k in range(count):
            value = (values[k] / total if total != 0.0 else values[k]) * (1 << BITS)
            weights[i, k] = int(value - 0.5) if value < 0 else int(value + 0.5)
        firsts[i] = first
        counts[i] = count
    return firsts, counts, weights


@_compiled(types.uint8(types.int32))
def _rounded(total):
    return min(max(total >> BITS, 0), 255)


@_compiled(_LINES(_SOURCE, *[types.int64] * 4, _WEIGHTS, types.boolean))
def _narrower(source, left, top, right, bottom, weights, flip):
    """Resizes each row of a crop: uint8 (H, 3 W) -> (bottom - top, 3 size), mirrored if `flip`."""
    firsts, counts, values = weights
    width, height, size = right - left, bottom - top, len(firsts)
    result = np.empty((height, size * 3), np.uint8)
    block = np.empty((width * 3, ROWS), np.uint8)  # transposed: the sums below run over neighbouring bytes
    sums = np.empty(ROWS, np.int32)
    for y in range(0, height, ROWS):
        rows = min(ROWS, height - y)
        for r in range(rows):
            line = source[top + y + r, left * 3 : right * 3]
            for j in range(width * 3):
                block[np.uintp(j), np.uintp(r)] = line[np.uintp(j)]  # unsigned, so that no index can be negative
        for x in range(size):
            place = size - 1 - x if flip else x
            for c in range(3):
                sums[:] = 1 << (BITS - 1)
                for k in range(counts[x]):
                    weight = values[x, k]
                    column = block[(firsts[x] + k) * 3 + c]
                    for r in range(ROWS):
                        sums[r] += np.int32(column[r]) * weight
                for r in range(rows):
                    result[np.uintp(y + r), np.uintp(place * 3 + c)] = _rounded(sums[r])
    return result


@_compiled(_LINES(_SOURCE, *[types.int64] * 4, _WEIGHTS))
def _lower(source, left, top, right, bottom, weights):
    """Resizes each column of a crop: uint8 (H, 3 W) -> (size, 3 (right - left))."""
    firsts, counts, values = weights
    length, size = (right - left) * 3, len(firsts)
    result = np.empty((size, length), np.uint8)
    sums = np.empty(length, np.int32)
    for y in range(size):
        sums[:] = 1 << (BITS - 1)
        for k in range(counts[y]):
            weight = values[y, k]
            row = source[top + firsts[y] + k, left * 3 : right * 3]
            for j in range(length):
                sums[j] += np.int32(row[j]) * weight
        for j in range(length):
            result[y, j] = _rounded(sums[j])
    return result


@_compiled(
    types.uint8[:, :, ::1](
        _PIXELS, *[types.int64] * 4, types.UniTuple(types.float64, 4), types.int64, *[types.boolean] * 2
    )
)
def _resize(pixels, left, top, right, bottom, box, size, flip, any_order):
    """Resizes `box` = (left, top, width, height) of the crop to (size, size, 3).

    `any_order`: whether the columns may be resized before the rows.
    """
    width, height = right - left, bottom - top
    across = _weights(width, box[0], box[2], size)
    down = _weights(height, box[1], box[3], size)
    source = pixels.reshape(pixels.shape[0], -1)
    # Pillow's choice of the order, which is the faster one for its loops.
    if any_order and height > size and height - size > 2 * (width - size):
        lines = _narrower(_lower(source, left, top, right, bottom, down), 0, 0, width, size, across, flip)
    else:
        lines = _lower(_narrower(source, left, top, right, bottom, across, flip), 0, 0, size, height, down)
    return lines.reshape(size, size, 3)


def bicubic(
    pixels: np.ndarray,
    crop: tuple[int, int, int, int],
    size: int,
    *,
    flip: bool = False,
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """What Pillow's `crop(crop).resize((size, size), BICUBIC, box)` gives, mirrored if `flip`.

    Args:
      pixels: uint8 (H, W, 3).
      crop: (left, top, right, bottom) within the picture.
      box: the part of the crop that is resized, in fractions of its pixels; default: all of it.

    Returns:
      uint8 (size, size, 3).
    """
    left, top, right, bottom = crop
    start_x, start_y, stop_x, stop_y = np.array(box or (0, 0, right - left, bottom - top), np.float32)  # as Pillow does
    if max(right - left, bottom - top) <= LONGEST:
        box = (start_x, start_y, stop_x - start_x, stop_y - start_y)
        return _resize(np.ascontiguousarray(pixels), left, top, right, bottom, box, size, flip, ANY_ORDER)
    part = Image.fromarray(np.ascontiguousarray(pixels[top:bottom, left:right]))
    resized = np.asarray(part.resize((size, size), Image.Resampling.BICUBIC, box))
    return np.ascontiguousarray(resized[:, ::-1]) if flip else resized
