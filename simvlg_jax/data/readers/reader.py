"""What every reader of a format gives: a plan of shards, and the records of each shard."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from etils import epath

from simvlg_jax.data.extras import NONE, Extras
from simvlg_jax.data.index import Tar


class Skip(NamedTuple):
    """A record, or a part of one, that cannot be used."""

    where: str
    reason: str


class Item(NamedTuple):
    """A record as the source holds it; the picture or video is not checked yet.

    Attributes:
      where: names the record in messages.
      media: the encoded picture or video.
      texts: captions, or the answers to the question.
      offset: of the media in the tar, if the source is one.
      faults: why some of its texts are left out.
      extras: what evaluations use besides.
    """

    where: str
    id: str
    media: bytes
    texts: list[str]
    question: str | None = None
    offset: int = 0
    faults: tuple[str, ...] = ()
    extras: Extras = NONE


class Example(NamedTuple):
    """A record that a plan lists by the path of its picture or video.

    Attributes:
      root: number of the folder that the path is relative to, in `Plan.roots`.
      texts: captions or answers; None if they are in the file `beside`.
      stamp: size and time of the files, if the plan knows them.
      extras: what evaluations use besides.
    """

    where: str
    root: int
    path: str
    id: str
    texts: Sequence[str] | None
    question: str | None = None
    beside: str = ""
    stamp: str = ""
    extras: Extras = NONE


class Options(NamedTuple):
    """What the user chose.

    Attributes:
      split: rows of other splits are left out, if rows name a split.
      images: the folder that paths in lists are relative to; "" is that of the list.
      index_only: the media stay in the tars.
      unlabelled: rows without a caption or an answer are records too. For lists and tables.
    """

    split: str = "train"
    images: str = ""
    index_only: bool = False
    unlabelled: bool = False


class Shard(Protocol):
    """A part of a source that one call reads: a small picklable description.

    Attributes:
      weight: how much work it is, in the unit of `Plan.unit`.
      tar: the tar that its items lie in, if they lie in one.
    """

    weight: int
    tar: Tar | None

    def read(self) -> Iterator[tuple[int, Item | Skip]]:
        """Yields what the shard holds, each with the weight that is done before it."""


@dataclass
class Plan:
    """A source as shards in a fixed order, or as entries that are still to be put into shards.

    Attributes:
      media: what the records hold, "image" or "video".
      questions: whether the records are questions with answers.
      unit: what `Shard.weight` counts, "records" or "bytes".
    """

    media: str = "image"
    questions: bool = False
    shards: list[Shard] = field(default_factory=list)
    entries: list[Example | Skip] = field(default_factory=list)
    roots: list[str] = field(default_factory=list)
    unit: str = "records"


class Reader(Protocol):
    """A module of this folder."""

    def recognises(self, source: epath.Path) -> bool: ...

    def plan(self, sources: Iterable[str], options: Options) -> Plan: ...
