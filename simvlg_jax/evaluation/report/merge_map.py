"""Draws which patches of a picture were merged into which token of the connector."""

import colorsys
import math

import numpy as np
from PIL import Image, ImageDraw

_INK = (38, 44, 58)


def merge_map(image: np.ndarray, source_map: np.ndarray, size: int = 256) -> Image.Image:
    """Returns the picture with one tint per merged token, and lines between adjacent patches of different tokens.

    Patches with the same tint were merged into one token, wherever they are. A patch that was not merged has no tint.
    Larger tokens get more distinct hues. Patches merged with the class token have a dot (the published connector never
    merges it, so none has).

    Args:
      image: (H, W, 3) uint8, the input of the vision encoder; drawn as a square.
      source_map: (grid * grid,) or (1 + grid * grid,) int, the output token of each input token: the class token first,
        if there is one, then patches by row.
      size: approximate side of the drawing in pixels, rounded to a multiple of the grid.

    Raises:
      ValueError: the length of source_map is neither a square nor 1 + a square.
    """
    source_map = np.asarray(source_map)
    grid = math.isqrt(len(source_map))
    class_tokens = len(source_map) - grid * grid
    if grid < 1 or class_tokens > 1:
        raise ValueError(
            f"a source map of {len(source_map)} tokens is not a square of patches, with or without a class token"
        )
    groups = source_map[class_tokens:].reshape(grid, grid)
    cell = max(round(size / grid), 8)
    picture = Image.fromarray(image).resize((cell * grid, cell * grid), Image.Resampling.LANCZOS)
    # Multiplying keeps lines and shading readable; a share of the plain tint shows it on dark colours too.
    pixels = np.asarray(picture).astype(np.float32)  # (side, side, 3)
    tints, merged = (np.kron(x, np.ones((cell, cell, 1))) for x in _tints(groups))
    tinted = 0.72 * pixels * tints + 0.28 * 255 * tints
    drawing = Image.fromarray(np.where(merged, tinted, pixels).round().astype(np.uint8))
    _outline(drawing, groups, cell)
    for row, column in np.argwhere(np.isin(groups, source_map[:class_tokens])):
        centre = ((column + 0.5) * cell, (row + 0.5) * cell)
        ImageDraw.Draw(drawing).circle(centre, cell / 6, fill=_INK, outline="white", width=max(cell // 24, 1))
    return drawing


def _tints(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maps (grid, grid) groups to (grid, grid, 3) colours in 0..1 and (grid, grid, 1) whether a patch was merged."""
    numbers, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    tints = np.ones((len(numbers), 3))
    by_size = [group for group in np.argsort(-counts, kind="stable") if counts[group] > 1]
    for rank, group in enumerate(by_size):
        # Steps of the golden angle keep hues apart; each further round of 8 is paler.
        hue, saturation = (0.56 + rank * 0.618034) % 1, max(0.42 - 0.10 * (rank // 8), 0.16)
        tints[group] = colorsys.hsv_to_rgb(hue, saturation, 0.98)
    inverse = inverse.reshape(groups.shape)
    return tints[inverse], (counts > 1)[inverse][..., None]


def _outline(drawing: Image.Image, groups: np.ndarray, cell: int) -> None:
    """Draws thick lines between patches of different groups and around the picture."""
    draw = ImageDraw.Draw(drawing)
    width = max(cell // 12, 2)
    padded = np.pad(groups, 1, constant_values=-1)
    for row, column in np.argwhere(padded[1:, :] != padded[:-1, :]):  # between padded rows `row` and `row` + 1
        x, y = (column - 1) * cell, row * cell
        draw.line([(x - width // 2, y), (x + cell + width // 2, y)], fill=_INK, width=width)
    for row, column in np.argwhere(padded[:, 1:] != padded[:, :-1]):
        x, y = column * cell, (row - 1) * cell
        draw.line([(x, y - width // 2), (x, y + cell + width // 2)], fill=_INK, width=width)
