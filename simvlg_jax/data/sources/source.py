"""What every data source gives: records by index."""

from typing import NamedTuple, NotRequired, Protocol, TypedDict

import numpy as np

from simvlg_jax.data.extras import NONE, Extras


class Record(TypedDict):
    """One example.

    Attributes:
      image: encoded bytes of a picture (PNG, JPEG, ...) or of a video, or uint8 (H, W, 3).
      caption: the text that is learned.
      references: all captions of the picture, or with a question all answers that people gave, equal ones repeated;
        evaluation compares with them.
      id: names the picture; unique among the pictures of a split.
      question: the text that the caption answers.
      choices: texts of which training draws one for each view, instead of `caption`.
      prompt: the text that the caption continues; never a target. `load_source` adds it.
    """

    image: bytes | np.ndarray
    caption: str
    references: list[str]
    id: str
    question: NotRequired[str]
    choices: NotRequired[list[str]]
    prompt: NotRequired[str]


class RecordInfo(NamedTuple):
    """What scores need of a record, without its picture.

    Attributes:
      id, references, question: as in `Record`.
      extras: what evaluations use besides.
      prompt: the text that the caption continues. `load_source` adds it.
    """

    id: str
    references: list[str]
    question: str | None = None
    extras: Extras = NONE
    prompt: str = ""


class Source(Protocol):
    """Random access to the records of one split, from several threads or processes.

    A source for training has one record for each caption, or each question, or each picture with `choices`. Any other
    source has one record for each picture or question, and `caption` is its first caption.

    A source may also have `prefetch(start, stop)`: called before records of that range are read one by one, in random
    order, so that it can ask storage for all of them at once.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Raises IndexError past the end, and one of `transforms.UNREADABLE` if the record cannot be read."""

    def info(self, index: int) -> RecordInfo:
        """Id and references, without reading the picture."""
