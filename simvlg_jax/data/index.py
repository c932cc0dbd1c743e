"""The index of a prepared split: the texts of every record, and the place of its picture if that lies in a tar.

An index is one Arrow file. It is mapped into memory, so opening ten million records takes under a second, and texts are
read without the pictures. The columns are id, texts (captions, or the answers to a question) and question, which is
null for captions. Pictures in ArrayRecord files have the same order as the rows. For pictures in tars, the columns tar
(a number into `Index.tars`), offset and size (bytes) say where the encoded picture is. The columns group, choices,
correct and reverse_caption are the fields of `Extras`; older indexes lack them.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from etils import epath
from pyarrow import ipc

from simvlg_jax.data.extras import Extras
from simvlg_jax.utils.errors import UserError
from simvlg_jax.utils.files import atomic_write

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "texts": pa.list_(pa.string()),
        "question": pa.string(),
        "tar": pa.int32(),
        "offset": pa.int64(),
        "size": pa.int64(),
        "group": pa.string(),
        "choices": pa.list_(pa.string()),
        "correct": pa.int32(),
        "reverse_caption": pa.string(),
    }
)
OPTIONAL = Extras._fields  # columns that older indexes lack, the last ones
BATCH = 2**16  # rows
KEY = b"simvlg_jax"  # of the metadata
MEDIA = ("image", "video")


class Tar(NamedTuple):
    """A tar with pictures: its path, and its size in bytes when it was indexed."""

    path: str
    size: int


class Row(NamedTuple):
    """One record: texts, where its picture lies in a tar, and the fields of its `Extras`."""

    id: str
    texts: list[str]
    question: str | None = None
    tar: int = -1
    offset: int = 0
    size: int = 0
    group: str | None = None
    choices: Sequence[str] | None = None
    correct: int | None = None
    reverse_caption: str | None = None

    @property
    def extras(self) -> Extras:
        return Extras(self.group, tuple(self.choices or ()), self.correct, self.reverse_caption)


def write_index(path: epath.PathLike, rows: Iterable[Row], *, media: str = "image", tars: Sequence[Tar] = ()) -> None:
    """Writes an index; the file appears when it is whole.

    Args:
      path: local, or in a bucket.
      media: what the records hold, one of MEDIA.
      tars: the tars with the pictures; empty if the pictures are in ArrayRecord files.
    """
    rows = iter(rows)
    batches = iter(lambda: list(islice(rows, BATCH)), [])
    columns = (dict(zip(SCHEMA.names, zip(*batch, strict=True), strict=True)) for batch in batches)
    _write(path, (pa.record_batch(column, SCHEMA) for column in columns), media, tars)


def merge_indexes(path: epath.PathLike, parts: Iterable[epath.PathLike]) -> None:
    """Writes the rows of all parts, in order, to one index. The parts hold the same media."""
    tars: list[Tar] = []
    media = set()
    for part in (parts := list(parts)):
        index = Index(part)
        media.add(index.media)
        tars += index.tars

    def batches() -> Iterator[pa.RecordBatch]:
        first = 0  # number of the part's first tar
        for part in parts:
            index = Index(part)
            for batch in map(_completed, index.table.to_batches()):
                shifted = pa.array(np.asarray(batch.column("tar")) + np.int32(first), pa.int32())
                yield batch.set_column(SCHEMA.get_field_index("tar"), "tar", shifted) if index.tars else batch
            first += len(index.tars)

    (kind,) = media
    _write(path, batches(), kind, tars)


def _completed(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Adds the columns that a part of an older version lacks."""
    for name in SCHEMA.names[batch.num_columns :]:
        batch = batch.append_column(SCHEMA.field(name), pa.nulls(len(batch), SCHEMA.field(name).type))
    return batch


def _write(path: epath.PathLike, batches: Iterable[pa.RecordBatch], media: str, tars: Sequence[Tar]) -> None:
    metadata = {KEY: json.dumps({"version": 1, "media": media, "tars": list(tars)}).encode()}
    with (
        atomic_write(epath.Path(path)) as partial,
        partial.open("wb") as file,
        ipc.new_file(file, SCHEMA.with_metadata(metadata)) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)


class Index:
    """Rows of an index by number, from several threads or processes.

    Attributes:
      media: "image" or "video".
      tars: the tars with the pictures; empty if they are in ArrayRecord files.
      table: the Arrow table.

    Raises UserError if the file is absent or not an index.
    """

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        try:
            self.table = ipc.open_file(pa.memory_map(os.fspath(_local(self.path)))).read_all()
            about = json.loads((self.table.schema.metadata or {})[KEY])
        except FileNotFoundError as error:
            raise UserError(
                f"there is no index {self.path}; write it with: python -m simvlg_jax.data.prepare"
            ) from error
        except (OSError, pa.ArrowInvalid, KeyError, ValueError) as error:
            raise UserError(
                f"{self.path} is no index of simvlg_jax, or damaged ({error}): delete its folder and prepare it again"
            ) from error
        self.media, self.tars = about["media"], [Tar(*tar) for tar in about["tars"]]
        there = [name for name in SCHEMA.names if name not in OPTIONAL or name in self.table.schema.names]
        self._columns = [self.table.column(name) for name in there]
        chunks = self._columns[0].chunks
        self._starts = np.cumsum([0, *map(len, chunks)])  # of the chunks

    def __reduce__(self) -> tuple:
        return Index, (os.fspath(self.path),)

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, number: int) -> Row:
        if not 0 <= number < len(self):
            raise IndexError(number)
        chunk = int(np.searchsorted(self._starts, number, side="right")) - 1
        row = int(number - self._starts[chunk])
        return Row(*(column.chunk(chunk)[row].as_py() for column in self._columns))

    def counts(self) -> np.ndarray:
        """Number of texts of each record, int32 (N,)."""
        chunks = self.table.column("texts").chunks
        return np.concatenate([np.zeros(0, np.int32), *(np.asarray(chunk.value_lengths()) for chunk in chunks)])

    @property
    def has_questions(self) -> bool:
        return self.table.column("question").null_count < len(self)


def _local(path: epath.Path) -> Path:
    """Returns a path that can be mapped into memory. An index in a bucket is copied once to the temporary folder."""
    if "://" not in os.fspath(path):
        return Path(path)
    import fsspec  # late: local paths do not need it

    system, inside = fsspec.core.url_to_fs(os.fspath(path))
    # All that the bucket says of the file: size and time alone are equal for files that were written in turn.
    name = hashlib.sha256(f"{path} {system.ukey(inside)}".encode()).hexdigest()[:32]
    copy = Path(tempfile.gettempdir()) / f"simvlg_jax-{os.getuid()}" / f"{name}.arrow"
    if not copy.exists():
        copy.parent.mkdir(mode=0o700, exist_ok=True)
        with atomic_write(copy) as partial, partial.open("wb") as target, path.open("rb") as source:
            shutil.copyfileobj(source, target, 2**24)
    return copy
