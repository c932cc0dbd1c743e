"""What a record may have for evaluations, besides its picture and its texts."""

from typing import NamedTuple


class Extras(NamedTuple):
    """Optional parts of a record.

    Attributes:
      group: what the record belongs to, such as a domain of NoCaps: each group also has scores of its own.
      choices: the texts to choose the answer from.
      correct: the place of the right one in `choices`, None if the source does not say.
      reverse_caption: what is true of a video that is shown in reverse, None if the source does not say.
    """

    group: str | None = None
    choices: tuple[str, ...] = ()
    correct: int | None = None
    reverse_caption: str | None = None


NONE = Extras()
