"""Small pictures and clips of records, as text in a page."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from simvlg_jax.config.saved import read_config
from simvlg_jax.data.batch import Pictures
from simvlg_jax.data.clips import header
from simvlg_jax.data.pictures import squashed
from simvlg_jax.data.sources import load_source, name_of
from simvlg_jax.data.transforms import UNREADABLE
from simvlg_jax.data.views import view_of
from simvlg_jax.evaluation.report.merge_map import sheet_layout
from simvlg_jax.utils.errors import UserError, warn

SIDE = 96
LARGEST_PNG = 12_000  # bytes
LARGEST_VIDEO = 120_000  # bytes of a clip that a page holds as it is
BROWSERS_SHOW = ("h264", "vp8", "vp9", "av1", "libdav1d")  # names of FFmpeg's decoders


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


def sheet_text(frames: np.ndarray) -> str:
    """Returns (F, S, S, 3) uint8 as `picture_text` of all frames, side by side as in `sheet_layout`."""
    rows, columns = sheet_layout(len(frames))
    if frames.shape[1] > SIDE:
        frames = np.stack([squashed(Image.fromarray(frame), SIDE) for frame in frames])
    side = frames.shape[1]
    sheet = frames.reshape(rows, columns, side, side, 3).swapaxes(1, 2)
    return picture_text(np.ascontiguousarray(sheet.reshape(rows * side, columns * side, 3)))


def video_url(video: object) -> str | None:
    """Returns an encoded video as a URL that holds it; None if it is large, or nothing that all browsers show.

    They show H.264, VP8, VP9 and AV1 in MP4 and WebM.
    """
    if not isinstance(video, bytes) or len(video) > LARGEST_VIDEO:
        return None
    kind = "mp4" if video[4:8] == b"ftyp" else "webm" if video[:4] == b"\x1aE\xdf\xa3" else None
    try:
        codec = header(video)[0] if kind else None
    except OSError:
        return None
    if codec not in BROWSERS_SHOW:
        return None
    return f"data:video/{kind};base64,{base64.b64encode(video).decode()}"


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
