"""Short, stable reasons why data were skipped."""

from PIL import Image, UnidentifiedImageError

# Errors of a missing or unreadable file, the narrow types first.
REASONS: tuple[tuple[type[BaseException], str], ...] = (
    (FileNotFoundError, "missing file"),
    (NotADirectoryError, "missing file"),
    (IsADirectoryError, "not a file"),
    (PermissionError, "no permission"),
    (Image.DecompressionBombError, "too large"),
    (MemoryError, "too large"),
    (UnidentifiedImageError, "not a picture"),
    (EOFError, "truncated"),
)


class Fault(Exception):
    """Something is wrong with one record; the message is the reason to skip it."""


def reason(error: BaseException) -> str:
    """Returns the reason to skip a record whose reading or decoding raised `error`."""
    if isinstance(error, Fault):
        return str(error)
    for kind, text in REASONS:
        if isinstance(error, kind):
            return text
    message = str(error).lower()
    if "truncated" in message:
        return "truncated"
    return "too large" if "more than the limit" in message else "damaged"
