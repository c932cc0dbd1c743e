"""How large a video file says it is, in the containers that say it: Matroska, WebM and AVI."""

EBML, SEGMENT, RIFF = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67", b"RIFF"


def declared_size(data: bytes) -> int | None:
    """The number of bytes of the whole file. None if it is not known, as of a file that was written as a stream."""
    if data[:4] == RIFF:
        return _riff(data)
    return _matroska(data) if data[:4] == EBML else None


def _riff(data: bytes) -> int | None:
    """The end of the last of the chunks that large AVI files have one after the other."""
    end = start = 0
    while data[start : start + 4] == RIFF:
        size = int.from_bytes(data[start + 4 : start + 8], "little")
        if size in (0, 2**32 - 1):
            return None
        end = start + 8 + size
        start = end + size % 2
    return end


def _matroska(data: bytes) -> int | None:
    """The end of the first segment, which holds everything behind the header."""
    start = 0
    while start + 4 <= len(data):
        segment = data[start : start + 4] == SEGMENT
        start += _length(data[start])  # of the id
        count = _length(data[start]) if start < len(data) else 9
        if count > 8:
            return None
        size = int.from_bytes(data[start : start + count], "big") & (1 << 7 * count) - 1
        if size == (1 << 7 * count) - 1:  # unknown
            return None
        start += count + size
        if segment:
            return start
    return None


def _length(first: int) -> int:
    """Bytes of an id or a number that begins with this byte."""
    return 9 - first.bit_length()
