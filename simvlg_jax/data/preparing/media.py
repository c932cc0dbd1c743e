"""Checks pictures by decoding them once, and videos; makes pictures smaller."""

import importlib.util
import io

from PIL import Image

from simvlg_jax.data import clips, transforms
from simvlg_jax.data.skips import Fault, reason

QUALITY = 95  # of JPEG
FRAME_SIDE = 16  # pixels, of the frame that is decoded
EBML, RIFF = b"\x1a\x45\xdf\xa3", b"RIFF"  # WebM and Matroska; AVI
BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")  # the first of MP4 and QuickTime


def checked(media: str, data: bytes, max_side: int = 0) -> bytes:
    """Returns the bytes that are written for a picture or video. Raises Fault if it cannot be decoded.

    Args:
      media: "image" or "video".
      max_side: a larger picture becomes a JPEG with this longer side, in pixels; 0 leaves all as they are.
    """
    if media == "video":
        _check_video(data)
        return data
    try:
        picture = transforms.decode(data)
        if not max_side or max(picture.size) <= max_side:
            return data
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=None)
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=QUALITY)
    except Exception as error:  # damaged pictures make Pillow's decoders raise any type
        raise Fault(reason(error)) from error
    return out.getvalue()


def _check_video(data: bytes) -> None:
    """Looks at the first bytes. Its first frame is decoded too, if the package `av` is installed."""
    known = data[:4] == EBML or data[4:8] in BOXES or (data[:4] == RIFF and data[8:12] == b"AVI ")
    if not known:
        raise Fault("not a video")
    if importlib.util.find_spec("av") is None:
        return
    try:
        clips.decode(data, 1, "uniform", FRAME_SIDE)
    except Exception as error:  # FFmpeg's errors have many types
        raise Fault(reason(error)) from error
