"""What every data source gives: records by index."""

from typing import NamedTuple, NotRequired, Protocol, TypedDict

import numpy as np


class Record(TypedDict):
    """One example.

    Attributes:
      image: encoded bytes of a picture (PNG, JPEG, ...) or of a video, or uint8 (H, W, 3).
      caption: the text that is learned.
      references: all captions of the picture; evaluation compares with them.
      id: names the picture; unique among the pictures of a split.
      question: the text that the caption answers; the references are then the answers of several people.
      choices: texts of which training draws one for each view, instead of `caption`.
    """

    image: bytes | np.ndarray
    caption: str
    references: list[str]
    id: str
    question: NotRequired[str]
    choices: NotRequired[list[str]]


class RecordInfo(NamedTuple):
    """The part of a `Record` that scores need."""

    id: str
    references: list[str]


class Source(Protocol):
    """Random access to the records of one split, from several threads or processes.

    A source for training has one record for each caption, or one for each picture with `choices`. Any other source has
    one record for each picture, and `caption` is its first caption.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Raises IndexError past the end, and one of `transforms.UNREADABLE` if the picture cannot be read."""

    def info(self, index: int) -> RecordInfo:
        """Id and references, without reading the picture."""
