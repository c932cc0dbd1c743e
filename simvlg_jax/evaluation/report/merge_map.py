"""Draws which patches of a picture or a clip merged into which token of the connector, layer by layer, as SVG paths."""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np


@dataclass(frozen=True)
class Layer:
    """The drawing of one source map, in units of a patch, for a square of `grid` patches a side, or a sheet of them.

    A path of patches is drawn with a line as wide as a patch, half a patch further down.

    Attributes:
      tokens: how many tokens are left.
      merged: path of all patches that were merged with another one.
      tints: (colour, path of the patches) of each merged token, the largest first.
      lines: path of the lines between patches of different tokens and around the picture, without those of the next
        layer. So a layer shows its own lines and those of all later layers.
      dots: centres of the patches that were merged with the class token (the published connector never merges it).
    """

    tokens: int
    merged: str
    tints: list[tuple[str, str]]
    lines: str
    dots: list[tuple[float, float]]


@dataclass(frozen=True)
class MergeMap:
    """The drawings of a picture or clip after each layer.

    Attributes:
      grid: patches a side, of a picture or of a frame.
      rows, columns: of frames on the sheet of a clip; 1 for a picture.
    """

    grid: int
    layers: list[Layer]
    rows: int = 1
    columns: int = 1


def sheet_layout(frames: int) -> tuple[int, int]:
    """Returns rows and columns of a sheet of frames, all of them filled: 4 in a row if possible."""
    columns = frames if frames < 4 else next((n for n in (4, 5, 6, 3) if frames % n == 0), frames)
    return frames // columns, columns


def merge_map(source_maps: Sequence[Sequence[int]], frames: int = 1) -> MergeMap:
    """Returns the drawings of the source maps after each layer.

    Patches with the same tint were merged into one token, wherever they are. A patch that was not merged has no tint.
    Larger tokens get more distinct hues. From layer to layer, a token keeps the tint of its largest part.

    Args:
      source_maps: of each layer (frames * grid * grid,) or (1 + frames * grid * grid,) int, the output token of each
        input token: the class token first, if there is one, then patches by row, frame after frame.
      frames: of a clip; they are drawn on a sheet, see `sheet_layout`.

    Raises:
      ValueError: the length of a source map is neither `frames` squares nor 1 + that.
    """
    maps = [np.asarray(source_map) for source_map in source_maps]
    length = len(maps[-1])
    grid = math.isqrt(length // frames)
    class_tokens = length - frames * grid * grid
    if grid < 1 or class_tokens not in (0, 1):
        raise ValueError(f"a source map of {length} tokens is not a square of patches, with or without a class token")
    rows, columns = sheet_layout(frames)

    def sheet(source_map: np.ndarray) -> np.ndarray:  # -> (rows * grid, columns * grid)
        squares = source_map[class_tokens:].reshape(rows, columns, grid, grid)
        return squares.swapaxes(1, 2).reshape(rows * grid, columns * grid)

    layers, above, hues, later = [], None, {}, None
    for source_map in reversed(maps):
        groups = source_map[class_tokens:]  # (frames * grid * grid,)
        hues = _hues(groups, above, hues)
        borders = _borders(sheet(source_map))
        lines = borders if later is None else [now & ~then for now, then in zip(borders, later, strict=True)]
        class_groups = set(source_map[:class_tokens].tolist())
        layers.append(_layer(sheet(source_map), class_groups, hues, source_map, _lines(*lines)))
        above, later = groups, borders
    return MergeMap(grid, layers[::-1], rows, columns)


def _hues(groups: np.ndarray, above: np.ndarray | None, hues_above: dict[int, int]) -> dict[int, int]:
    """Returns the number of the tint of each merged token, in descending order of their sizes.

    Args:
      groups: (P,) the token of each patch after a layer.
      above: (P,) after the next layer, or None for the last one.
      hues_above: the result of this function for the next layer.
    """
    numbers, first, sizes = np.unique(groups, return_index=True, return_counts=True)
    by_size = [place for place in np.argsort(-sizes, kind="stable") if sizes[place] > 1]
    hues: dict[int, int] = {}
    fresh = (number for number in count() if number not in hues_above.values())
    for place in by_size:
        inherited = None if above is None else hues_above[int(above[first[place]])]
        hues[int(numbers[place])] = next(fresh) if inherited is None or inherited in hues.values() else inherited
    return hues


def _layer(
    groups: np.ndarray, class_groups: set[int], hues: dict[int, int], source_map: np.ndarray, lines: str
) -> Layer:
    """Draws groups (rows, columns) of patches; `class_groups` are those of the class token."""
    return Layer(
        tokens=int(source_map.max()) + 1,
        merged=_cells(np.isin(groups, list(hues))),
        tints=[(_colour(hue), _cells(groups == group)) for group, hue in hues.items()],
        lines=lines,
        dots=[(column + 0.5, row + 0.5) for row, column in np.argwhere(np.isin(groups, list(class_groups))).tolist()],
    )


def _colour(number: int) -> str:
    # Steps of the golden angle keep hues apart; each further round of 8 is paler.
    hue, saturation = (0.56 + number * 0.618034) % 1, max(0.42 - 0.10 * (number // 8), 0.16)
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hsv_to_rgb(hue, saturation, 0.98))


def _runs(flags: np.ndarray) -> list[tuple[int, int, int]]:
    """Returns (row, first column, length) of each run of True in (rows, columns)."""
    edges = np.diff(np.pad(flags.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    starts, ends = np.argwhere(edges == 1), np.argwhere(edges == -1)
    return [(row, start, end - start) for (row, start), (_, end) in zip(starts.tolist(), ends.tolist(), strict=True)]


def _cells(flags: np.ndarray) -> str:
    """Returns the path of the cells of (rows, columns) that are True: a line along the top of each run in a row."""
    return "".join(f"M{column} {row}h{length}" for row, column, length in _runs(flags))


def _borders(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns whether there is a line between rows, (rows + 1, columns), and between columns, (rows, columns + 1)."""
    padded = np.pad(groups, 1, constant_values=-1)
    return padded[1:, 1:-1] != padded[:-1, 1:-1], padded[1:-1, 1:] != padded[1:-1, :-1]


def _lines(across: np.ndarray, down: np.ndarray) -> str:
    return _cells(across) + "".join(f"M{column} {row}v{length}" for column, row, length in _runs(down.T))
