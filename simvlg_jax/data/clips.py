"""Decodes video clips with PyAV: chooses frames, squashes them to a square and takes a clip's training view.

PyAV is an extra, `pip install simvlg_jax[video]`.
"""

import bisect
import contextlib
import errno
import io
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import UnidentifiedImageError

from simvlg_jax.data import transforms
from simvlg_jax.data.packets import Packet, read_packets, starts
from simvlg_jax.utils.errors import UserError

# The containers of FFmpeg that hold one file. Others are unsafe: a playlist, for example, opens other files.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg,gif,m4v,h264,hevc,ivf,nut"
REDUCIBLE = ("mjpeg", "mpeg4")  # codecs that FFmpeg decodes at 1/2, 1/4 or 1/8 of their size
SHIFTS = (3, 2, 1)  # binary logarithms of these factors


def frame_indices(total: int, count: int, how: str, rng: np.random.Generator | None = None) -> np.ndarray:
    """Chooses frames of a clip.

    A clip with fewer than `count` frames gives all of them, and its last frame is repeated so that shapes are fixed.

    Args:
      total: number of frames of the clip, at least 1.
      how: "uniform", the first frame of each of `count` equal segments, or "headtail": count // 2 random frames of the
        first half and the others of the second half.
      rng: draws for "headtail".

    Returns:
      int64 (count,), ascending.
    """
    chosen = min(count, total)
    if how == "uniform":
        indices = np.arange(chosen) * total // chosen  # in integers: 3 * (7 / 3) is below 7 for some floats
    elif how == "headtail":
        half, first = total // 2, chosen // 2
        head = rng.choice(half, first, replace=False)
        tail = half + rng.choice(total - half, chosen - first, replace=False)
        indices = np.concatenate([np.sort(head), np.sort(tail)])
    else:
        raise ValueError(f"frames are chosen by 'uniform' or 'headtail', not {how!r}")
    return np.pad(indices.astype(np.int64), (0, count - chosen), constant_values=total - 1)


def decode(
    video: bytes, count: int, how: str, side: int, rng: np.random.Generator | None = None, *, reduced: bool = False
) -> np.ndarray:
    """Decodes `count` frames of a video, upright and squashed to a square by swscale's bicubic filter, as decord does.

    Frames are counted in packets, which is exact unless the stream is damaged. Only the parts between two keyframes
    that hold a chosen frame are decoded, up to the last one. If the decoder gives fewer frames than there are packets,
    the one before is repeated.

    Args:
      how, rng: see `frame_indices`.
      reduced: MPEG-4 and Motion JPEG are decoded at 1/2, 1/4 or 1/8 of their size if that leaves `side` pixels in both
        directions. The pixels differ a little, in MPEG-4 more with each frame since the last keyframe.

    Returns:
      uint8 (count, side, side, 3).

    Raises:
      OSError: the bytes are not a video, are cut off, hold no frames or exceed a limit.
      UserError: PyAV is not installed.
    """
    with _opened(video) as (container, stream):
        context = stream.codec_context
        shift = _shift(context, side) if reduced else 0
        context.options = {"max_pixels": str(transforms.MAX_PIXELS), "lowres": str(shift)}
        context.thread_count = 1  # the pipeline decodes several clips at a time
        packets = read_packets(video, container, stream)
        shown = sum(packet.shown for packet in packets)
        if not shown:
            raise UnidentifiedImageError("the video has no frames")
        indices = frame_indices(shown, count, how, rng)
        frames = _frames(context, packets, np.unique(indices).tolist(), side)
    places = sorted(frames)
    return np.stack([frames[places[max(bisect.bisect(places, index) - 1, 0)]] for index in indices.tolist()])


def header(video: bytes) -> tuple[str, int, int]:
    """The codec of a video ("h264"), and width and height of its frames in pixels; no frame is decoded.

    Raises:
      OSError, UserError: as `decode`.
    """
    with _opened(video) as (_, stream):
        context = stream.codec_context
        return context.codec.name, context.width, context.height


def augment_clip(
    frames: np.ndarray, side: int, scale: tuple[float, float], flip: bool, rng: np.random.Generator
) -> np.ndarray:
    """Training view of a clip: `transforms.augment` with one crop and one flip for all frames.

    Args:
      frames: uint8 (F, H, W, 3).

    Returns:
      uint8 (F, side, side, 3).
    """
    from simvlg_jax.data.resize import bicubic  # late, as in `transforms`

    _, height, width, _ = frames.shape
    crop = transforms.crop_box(width, height, scale, rng)
    mirrored = flip and rng.random() < 0.5
    return np.stack([bicubic(frame, crop, side, flip=mirrored) for frame in frames])


def load_av():
    try:
        import av
    except ImportError as error:
        raise UserError("videos need PyAV: pip install 'simvlg_jax[video]'") from error
    av.logging.set_level(av.logging.PANIC)  # damaged videos are reported by their errors
    return av


@contextlib.contextmanager
def _opened(video: bytes) -> Iterator[tuple[Any, Any]]:
    """Yields container and video stream of PyAV, and raises OSError for whatever PyAV and FFmpeg raise."""
    av = load_av()
    if len(video) > transforms.MAX_BYTES:
        raise OSError(
            errno.EFBIG, f"the video has {len(video):,} bytes, more than the limit of {transforms.MAX_BYTES:,}"
        )
    try:
        options = {"format_whitelist": CONTAINERS}
        with av.open(io.BytesIO(video), options=options, metadata_errors="replace") as container:
            if not container.streams.video:
                raise UnidentifiedImageError("the file has no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise OSError("the video's codec is unknown")
            _check_size(stream.codec_context.width, stream.codec_context.height)
            yield container, stream
    except av.FFmpegError as error:  # some of them are OSErrors, others not
        raise OSError(f"not a readable video: {error.strerror}") from error
    except (ValueError, LookupError, ArithmeticError, MemoryError) as error:  # of PyAV, from values in damaged headers
        raise OSError(f"not a readable video: {error}") from error


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise OSError("the video has frames without a size")
    if width * height > transforms.MAX_PIXELS:
        raise OSError(
            errno.EFBIG, f"frames of {width} x {height} pixels are more than the limit of {transforms.MAX_PIXELS:,}"
        )


def _shift(context, side: int) -> int:
    """Binary logarithm of the factor by which frames may be reduced while they keep `side` pixels."""
    if context.name not in REDUCIBLE:
        return 0
    return next((shift for shift in SHIFTS if min(context.width, context.height) >> shift >= side), 0)


def _frames(context, packets: list[Packet], wanted: list[int], side: int) -> dict[int, np.ndarray]:
    """Decodes the parts between two `starts` that hold wanted frames, each up to the last of them.

    Args:
      wanted: indices of shown frames, ascending.

    Returns:
      Index -> uint8 (side, side, 3). Of a part whose decoder gives too few frames, the last one is there.

    Raises:
      OSError: no frame can be decoded.
    """
    places = starts(packets)
    keys = sorted(places)
    ends = [*(places[key] for key in keys[1:]), len(packets)]
    frames: dict[int, np.ndarray] = {}
    for part, indices in itertools.groupby(wanted, lambda index: bisect.bisect(keys, index) - 1):
        needed, shown, last = set(indices), keys[part], None
        context.flush_buffers()
        encoded = (packet.data for packet in packets[places[keys[part]] : ends[part]])
        for packet in itertools.chain(encoded, [None]):  # None: the decoder gives the frames that it holds back
            for last in context.decode(packet):
                if shown in needed:
                    frames[shown] = _pixels(last, side)
                shown += 1
            if shown > max(needed):
                break
        if last is not None and shown <= max(needed):
            frames[shown - 1] = _pixels(last, side)
    if not frames:
        raise OSError("no frame of the video can be decoded")
    return frames


def _pixels(frame, side: int) -> np.ndarray:
    """A decoded frame -> uint8 (side, side, 3), upright."""
    square = frame.reformat(side, side, "rgb24", interpolation="BICUBIC").to_ndarray()
    return np.ascontiguousarray(np.rot90(square, round(frame.rotation / 90)))
