"""Drawn shapes, for trials and tests without files."""

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from simvlg_jax.data.sources.source import Record, RecordInfo


class SyntheticSource:
    """Draws coloured shapes on demand, the same on every machine: "a red circle"."""

    SPLITS = ("train", "val", "test")
    TEST_SPLITS = ("test",)
    SIDE = 64  # pixels
    COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "pink")
    SHAPES = ("circle", "square", "triangle", "cross")

    def __init__(self, data_config: ConfigDict, split: str, training: bool = False):
        del training  # each picture has one caption
        self._split, self._size = split, data_config.synthetic_size[split]

    def __len__(self) -> int:
        return self._size

    def _draw(self, index: int) -> tuple[str, str, np.random.Generator]:
        """Colour, shape, and the generator that places the shape."""
        if not 0 <= index < self._size:
            raise IndexError(index)
        rng = np.random.default_rng([self.SPLITS.index(self._split), int(index)])
        return str(rng.choice(self.COLOURS)), str(rng.choice(self.SHAPES)), rng

    def info(self, index: int) -> RecordInfo:
        colour, shape, _ = self._draw(index)
        return RecordInfo(f"{self._split}-{index}", [f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"])

    def __getitem__(self, index: int) -> Record:
        colour, shape, rng = self._draw(index)
        half = int(rng.integers(self.SIDE // 6, self.SIDE // 3))
        x, y = (int(v) for v in rng.integers(half, self.SIDE - half, size=2))
        box = (x - half, y - half, x + half, y + half)
        picture = Image.new("RGB", (self.SIDE, self.SIDE), "white")
        draw = ImageDraw.Draw(picture)
        if shape == "circle":
            draw.ellipse(box, fill=colour)
        elif shape == "square":
            draw.rectangle(box, fill=colour)
        elif shape == "triangle":
            draw.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=colour)
        else:
            draw.rectangle((x - half, y - half // 3, x + half, y + half // 3), fill=colour)
            draw.rectangle((x - half // 3, y - half, x + half // 3, y + half), fill=colour)
        name, references, *_ = self.info(index)
        return {"image": np.asarray(picture), "caption": references[0], "references": references, "id": name}
