"""From a record to the pixels of an example: decoding, and the view of it that training or evaluation takes."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from simvlg_jax.data import transforms
from simvlg_jax.data.batch import Pictures
from simvlg_jax.data.sources.source import Record


class View(Protocol):
    """Raises one of `transforms.UNREADABLE` for a record that cannot be decoded."""

    def train(self, record: Record, rng: np.random.Generator) -> np.ndarray:
        """A random view: uint8, of the shape of one example of `Pictures`."""

    def evaluate(self, record: Record) -> np.ndarray:
        """The whole of it: uint8, of the same shape."""


@dataclass(frozen=True)
class PictureView:
    """Views (S, S, 3) of a picture.

    Attributes:
      scale: minimum and maximum share of the area that a random crop takes.
      flip: whether random views are mirrored with probability 1/2.
    """

    side: int
    scale: tuple[float, float] = (1.0, 1.0)
    flip: bool = False

    def train(self, record: Record, rng: np.random.Generator) -> np.ndarray:
        return transforms.augment(transforms.decode(record["image"]), self.side, self.scale, self.flip, rng)

    def evaluate(self, record: Record) -> np.ndarray:
        return transforms.squash(transforms.decode(record["image"]), self.side)


def view_of(pictures: Pictures | None, **options) -> View | None:
    """The view for a task's pictures, None without; clips (`pictures.frames` above 0) would have their own."""
    return pictures and PictureView(pictures.side, **options)
