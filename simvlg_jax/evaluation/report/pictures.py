"""Small pictures of records, as text in a page."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from simvlg_jax.config.saved import read_config
from simvlg_jax.data.batch import Pictures
from simvlg_jax.data.sources import load_source, name_of
from simvlg_jax.data.transforms import UNREADABLE
from simvlg_jax.data.views import view_of
from simvlg_jax.utils.errors import UserError, warn

SIDE = 96
LARGEST_PNG = 12_000  # bytes


def picture_text(pixels: np.ndarray) -> str:
    """Returns (H, W, 3) uint8, or the first frame of (F, H, W, 3), in base64: as a small PNG or else as a JPEG."""
    picture, encoded = Image.fromarray(pixels if pixels.ndim == 3 else pixels[0]), b""
    for options in (dict(format="PNG"), dict(format="JPEG", quality=88)):
        buffer = io.BytesIO()
        picture.save(buffer, **options)
        encoded = buffer.getvalue()
        if len(encoded) <= LARGEST_PNG:
            break
    return base64.b64encode(encoded).decode()


def data_url(text: str) -> str:
    """Returns the URL of a picture that is one of `picture_text`."""
    kind = "jpeg" if text.startswith("/9j/") else "png"  # base64 of the first bytes of every JPEG
    return f"data:image/{kind};base64,{text}"


def read_pictures(workdir: Path, name: str, ids: Mapping[int, str]) -> dict[str, str]:
    """Reads pictures from the data that a run was evaluated on.

    A record that is gone, unreadable or now has another id has no picture. If the data cannot be opened, none has one,
    and a warning says why.

    Args:
      workdir: a folder with the results of an evaluation, and its config.json.
      name: of the evaluation.
      ids: index of a record -> its id.

    Returns:
      id -> `picture_text` of SIDE x SIDE pixels.
    """
    found = {}
    try:
        config = read_config(workdir)
        entry = config.evals.get(name, {})
        data = config.data.copy_and_resolve_references()
        with data.unlocked():
            data.update(entry.get("data", {}))
        source = load_source(data, entry.get("split", name))
        view = view_of(Pictures(SIDE, data.frames))
    except (UserError, OSError) as error:
        warn(f"no pictures of {name}, since the data of {workdir} cannot be read: {error}")
        return found
    for index, identity in ids.items():
        try:
            if name_of(source, index) == identity:
                found[identity] = picture_text(view.evaluate(source[index]))
        except (IndexError, *UNREADABLE):
            continue
    return found
