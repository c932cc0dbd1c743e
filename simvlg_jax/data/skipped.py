"""Records that cannot be used: why, how many, and when there are too many of them."""

import errno
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from simvlg_jax.data.captions import CaptionError
from simvlg_jax.utils.errors import UserError, warn

# Words of the log and of messages, in the order in which processes exchange their counts.
REASONS = ("missing file", "read error", "not a picture", "too large", "truncated", "damaged", "caption")
MISSING = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}
WARNINGS = 3  # for each reason
MIN_DRAWN = 1000  # examples, before the share of the skipped ones means something


def reason(error: BaseException) -> str:
    """Returns the one of REASONS for one of `transforms.UNREADABLE`, by its type and errno."""
    if isinstance(error, CaptionError | UnicodeError):
        return "caption"
    if isinstance(error, UnidentifiedImageError):
        return "not a picture"
    if isinstance(error, Image.DecompressionBombError):
        return "too large"
    if isinstance(error, OSError) and error.errno is not None:
        return "missing file" if error.errno in MISSING else "too large" if error.errno == errno.EFBIG else "read error"
    # Pillow raises OSError without a number where the data end early.
    return "truncated" if isinstance(error, OSError | EOFError | struct.error) else "damaged"


class Skip(NamedTuple):
    """One skipped record.

    Attributes:
      reason: one of REASONS.
      error: the error in words.
      record: its number in the source.
      part: the name of the source in a mixture; "" for a single source.
    """

    reason: str
    error: str
    record: int
    part: str


class Skipped:
    """Counts the records that this process skipped since it started.

    Attributes:
      counts: reason -> number of records.
      drawn: number of examples, skipped ones included.
    """

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.drawn = 0

    @property
    def count(self) -> int:
        return self.counts.total()

    def add(self, skips: Sequence[Skip], drawn: int, name_of: Callable[[Skip], str]) -> None:
        """Counts the skips among `drawn` examples, and warns of the first few of each reason with their names."""
        self.drawn += drawn
        for skip in skips:
            self.counts[skip.reason] += 1
            if self.counts[skip.reason] <= WARNINGS:
                last = "; more of these are only counted" if self.counts[skip.reason] == WARNINGS else ""
                warn(f"skipped {name_of(skip)}: {skip.reason} ({skip.error}){last}")

    def check(self, max_share: float, enough: int) -> None:
        """Raises UserError if at least `enough` examples were drawn and more than `max_share` of them were skipped."""
        if self.drawn >= enough and self.count > max_share * self.drawn:
            raise UserError(
                f"{self.count} of the first {self.drawn} examples cannot be used ({in_words(self.counts)}), more than "
                f"the share of {max_share:g} that data.max_skipped allows: mend the data, or raise it"
            )


def in_words(counts: Counter[str]) -> str:
    """{"truncated": 3, "caption": 1} -> "3 truncated, 1 caption", the most frequent first."""
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())
