"""A single picture, however it is given, as a model sees it."""

from pathlib import Path

import numpy as np
from PIL import Image

from simvlg_jax.data import transforms
from simvlg_jax.utils.errors import UserError

Picture = str | Path | Image.Image | np.ndarray


def read_picture(picture: Picture, side: int) -> np.ndarray:
    """Returns the picture as (side, side, 3) uint8."""
    if isinstance(picture, str | Path):
        try:
            picture = transforms.decode(transforms.read(Path(picture)))
        except transforms.UNREADABLE as error:
            raise UserError(f"cannot read the picture {picture}: {error}") from error
    elif isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    return squashed(picture, side)


def squashed(picture: Image.Image, side: int) -> np.ndarray:
    """Returns the pixels of `transforms.squash`, without the time that loading its compiled loops takes."""
    return np.asarray(picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC))
