"""From a record to the pixels of an example: decoding, and the view of it that training or evaluation takes."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from simvlg_jax.data import clips, transforms
from simvlg_jax.data.batch import Pictures
from simvlg_jax.data.sources.source import Record


class View(Protocol):
    """Raises one of `transforms.UNREADABLE` for a record that cannot be decoded."""

    def train(self, record: Record, rng: np.random.Generator) -> np.ndarray:
        """A random view: uint8, of the shape of one example of `Pictures`."""

    def evaluate(self, record: Record) -> np.ndarray:
        """The whole of it: uint8, of the same shape."""


@dataclass(frozen=True)
class _View:
    """Options of a view.

    Attributes:
      pictures: the shape of an example.
      scale: minimum and maximum share of the area that a random crop takes.
      flip: whether random views are mirrored with probability 1/2.
      reduced: whether training decodes at a reduced size where that is possible.
    """

    pictures: Pictures
    scale: tuple[float, float] = (1.0, 1.0)
    flip: bool = False
    reduced: bool = False


class PictureView(_View):
    """Views (S, S, 3) of a picture."""

    def train(self, record: Record, rng: np.random.Generator) -> np.ndarray:
        side = self.pictures.side
        return transforms.view(record["image"], side, self.scale, self.flip, rng, reduced=self.reduced)

    def evaluate(self, record: Record) -> np.ndarray:
        return transforms.squash(transforms.pixels(record["image"]), self.pictures.side)


class ClipView(_View):
    """Views (F, S, S, 3) of a video: random frames of both halves for training, evenly spread ones for evaluation."""

    def train(self, record: Record, rng: np.random.Generator) -> np.ndarray:
        frames, side = self.pictures.frames, self.pictures.side
        clip = clips.decode(record["image"], frames, "headtail", side, rng, reduced=self.reduced)
        return clips.augment_clip(clip, side, self.scale, self.flip, rng)

    def evaluate(self, record: Record) -> np.ndarray:
        return clips.decode(record["image"], self.pictures.frames, "uniform", self.pictures.side)


def view_of(pictures: Pictures | None, **options) -> View | None:
    """The view for a task's pictures or clips, None without. Options are the fields of a view."""
    if pictures is None:
        return None
    return (ClipView if pictures.frames else PictureView)(pictures, **options)
