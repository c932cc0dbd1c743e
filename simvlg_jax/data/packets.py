"""The encoded frames of a video, before any is decoded: how many are shown, and where decoding may begin."""

from typing import Any, NamedTuple

import numpy as np

from simvlg_jax.data.containers import declared_size

MAX_PACKETS = 2**20  # of a video stream: nearly ten hours at 30 frames per second
_SHOWN = 0x10  # bit of a VP8 frame's first byte; frames without it are only referred to


class Packet(NamedTuple):
    """An encoded frame.

    Attributes:
      data: of PyAV.
      shown: False for frames that are only referred to, that the container's edit list leaves out, or that refer to
        what was before the first keyframe.
    """

    data: Any
    shown: bool


def read_packets(video: bytes, container: Any, stream: Any) -> list[Packet]:
    """The packets of a stream from the first keyframe on, in the order of decoding.

    Args:
      video: the bytes of the file.
      container, stream: of PyAV.

    Raises:
      OSError: the file is cut off, there are too many frames, or none is a keyframe.
    """
    packets: list[Packet] = []
    found = 0
    for packet in container.demux(stream):
        found += packet.dts is not None  # empty ones too, which stand for frames that did not change
        if packet.size:
            hidden = stream.codec_context.name == "vp8" and not bytes(packet)[0] & _SHOWN
            packets.append(Packet(packet, not hidden and not packet.is_discard))
        if len(packets) > MAX_PACKETS:
            raise OSError(f"the video has more than {MAX_PACKETS:,} frames; cut it into clips")
    if "mp4" in container.format.name and found < stream.frames:
        raise OSError(f"the video is cut off: it has {found} of {stream.frames} frames")
    _check_end(video, container, stream, packets)
    return _from_keyframe(packets)


def _check_end(video: bytes, container: Any, stream: Any, packets: list[Packet]) -> None:
    """Raises OSError if a file of Matroska, WebM or AVI is cut off: bytes are missing, and frames at the end too.

    Neither is enough: files with a wrong size play to their end, and the sound may be longer than the frames.
    """
    whole = declared_size(video)
    if whole is None or len(video) >= whole:
        return
    times = [(one.data.dts if one.data.pts is None else one.data.pts, one.data.duration or 0) for one in packets]
    end = max((time + duration for time, duration in times if time is not None), default=0) * stream.time_base
    # FFmpeg estimates the duration of a cut AVI file from its bytes; the number of frames is the header's.
    seconds = stream.frames * stream.time_base if stream.frames else (container.duration or 0) / 1e6
    slack = end / max(len(packets), 1) / 2  # half a frame, since times are rounded
    if end + slack < seconds or not seconds:
        raise OSError(f"the video is cut off: it has {len(video):,} of {whole:,} bytes")


def _from_keyframe(packets: list[Packet]) -> list[Packet]:
    """Leaves out what cannot be decoded where a stream was cut out of a longer one, not at a keyframe.

    Raises:
      OSError: no packet is a keyframe.
    """
    first = next((place for place, packet in enumerate(packets) if packet.data.is_keyframe), None)
    if first is None:
        if packets:
            raise OSError("the video has no keyframe, so none of its frames can be decoded")
        return []
    start = packets[first].data.pts

    def follows(packet: Packet) -> bool:
        return start is None or packet.data.pts is None or packet.data.pts >= start

    return [packet._replace(shown=packet.shown and follows(packet)) for packet in packets[first:]]


def starts(packets: list[Packet]) -> dict[int, int]:
    """Index of a shown frame -> place of its packet, for keyframes that divide the frames in time.

    Decoding may begin there: no frame that is decoded later is shown earlier. The first packet always counts.
    """
    places = {0: 0}
    times = [packet.data.pts for packet in packets]
    if any(time is None for time in times):
        return places
    latest_before = np.maximum.accumulate(times)
    earliest_after = np.minimum.accumulate(times[::-1])[::-1]
    shown = 0
    for place, packet in enumerate(packets):
        divides = place and latest_before[place - 1] < times[place] == earliest_after[place]
        if divides and packet.shown and packet.data.is_keyframe:
            places[shown] = place
        shown += packet.shown
    return places
