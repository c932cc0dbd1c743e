"""A single picture or clip, however it is given, as a model sees it."""

from pathlib import Path

import numpy as np
from PIL import Image

from simvlg_jax.data import transforms
from simvlg_jax.data.batch import Pictures
from simvlg_jax.utils.errors import UserError

Picture = str | Path | Image.Image | np.ndarray
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov")


def read_picture(picture: Picture, shape: Pictures) -> np.ndarray:
    """Returns a picture as (S, S, 3) uint8, or for a model of clips a clip as (F, S, S, 3), see `read_visual`.

    Raises:
      UserError: a file cannot be read. The message names it.
    """
    try:
        return read_visual(picture, shape)
    except transforms.UNREADABLE as error:
        given = picture if isinstance(picture, str | Path) else "array"
        raise UserError(f"cannot read the picture {given}: {error}") from error


def read_visual(picture: Picture, shape: Pictures) -> np.ndarray:
    """Returns a picture or clip as a model sees it.

    A model of clips sees evenly spread frames of a video, and a picture as a clip that stands still.

    Args:
      picture: a file, a PIL image, uint8 (H, W, 3), or for a model of clips also uint8 (T, H, W, 3), any T frames.
      shape: what the model takes.

    Returns:
      uint8 (S, S, 3), or (F, S, S, 3).

    Raises:
      One of `transforms.UNREADABLE`: it cannot be read, or is a video for a model of pictures.
      UserError: PyAV is needed and not installed.
    """
    if isinstance(picture, str | Path) and Path(picture).suffix.lower() in (*VIDEO_SUFFIXES, ".gif"):
        content = transforms.read(Path(picture))
        if shape.frames:
            from simvlg_jax.data import clips

            return clips.decode(content, shape.frames, "uniform", shape.side)
        if not str(picture).lower().endswith(".gif"):
            raise ValueError("it is a video, and the model takes pictures (data.frames is 0)")
        picture = transforms.decode(content)
    elif isinstance(picture, str | Path):
        picture = transforms.decode(transforms.read(Path(picture)))
    if isinstance(picture, np.ndarray) and picture.ndim == 4:
        if not shape.frames:
            raise ValueError("it is a clip, and the model takes pictures (data.frames is 0)")
        from simvlg_jax.data import clips

        chosen = picture[clips.frame_indices(len(picture), shape.frames, "uniform")]
        return np.stack([squashed(Image.fromarray(frame), shape.side) for frame in chosen])
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    still = squashed(picture, shape.side)
    return np.repeat(still[None], shape.frames, 0) if shape.frames else still


def squashed(picture: Image.Image, side: int) -> np.ndarray:
    """Returns the pixels of `transforms.squash`, without the time that loading its compiled loops takes."""
    return np.asarray(picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC))
