"""Parquet files with the encoded pictures in them, as Hugging Face's data sets have them, or with paths of pictures."""

import contextlib
import os
import posixpath
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from etils import epath

from simvlg_jax.data import transforms
from simvlg_jax.data.index import Tar
from simvlg_jax.data.readers import fields, listing, paths
from simvlg_jax.data.readers.reader import Item, Options, Plan, Shard, Skip
from simvlg_jax.data.skips import Fault
from simvlg_jax.utils.errors import UserError

ROWS = 16  # read at a time, since each may hold a large picture
COLUMNS = (*fields.IMAGE, *fields.VIDEO, *fields.CAPTION, *fields.QUESTION, *fields.ANSWER, *fields.SPLIT)
DAMAGED = (OSError, pa.ArrowException, ValueError, MemoryError)


def _open(file: str) -> pq.ParquetFile:
    """Verifies the checksums of pages where the file has them. Raises one of DAMAGED if it is no Parquet file."""
    data = epath.Path(file).open("rb") if paths.is_remote(file) else os.fspath(file)
    return pq.ParquetFile(data, page_checksum_verification=True)


def _columns(schema: pa.Schema, extra: tuple[str, ...] = ()) -> dict[str, str]:
    """Name of each column that is used, in lower case -> its name in the file."""
    return {name.strip().lower(): name for name in schema.names if name.strip().lower() in (*COLUMNS, *extra)}


def _media(schema: pa.Schema) -> tuple[str, str] | None:
    """The medium and the name of the column with encoded media, None if there is none."""
    columns = _columns(schema)
    for media, names in (("video", fields.VIDEO), ("image", fields.IMAGE)):
        name = fields.find(columns, names)
        if name is not None:
            kind = schema.field(columns[name]).type
            if pa.types.is_struct(kind):
                inner = [kind.field(number) for number in range(kind.num_fields)]
                kind = next((one.type for one in inner if one.name == "bytes"), pa.null())
            if any(test(kind) for test in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)):
                return media, columns[name]
    return None


def holds_bytes(file: str) -> bool | None:
    """Whether a column may hold encoded pictures. None if the file is damaged, which reading it reports."""
    try:
        with _open(file) as opened:
            schema = opened.schema_arrow
    except DAMAGED:
        return None
    if _media(schema) is None and fields.find(_columns(schema), (*fields.IMAGE, *fields.VIDEO)) is None:
        raise UserError(
            f"{file} has no column with pictures (columns: {', '.join(schema.names)}); addresses are not fetched: "
            f"download them first, for example with img2dataset, or name the column one of {', '.join(fields.IMAGE)}"
        )
    return _media(schema) is not None


def rows(file: str) -> Iterator[tuple[str, Any]]:
    """Rows of a file with paths, with their place; a Fault where the file is damaged."""
    number = 0
    try:
        with _open(file) as opened:
            columns = _columns(opened.schema_arrow, (*fields.IMAGE_ID, *fields.QUESTION_ID))
            for batch in opened.iter_batches(2**12, columns=list(columns.values())):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except DAMAGED:
        yield f"{file}, row {number + 1}", Fault("damaged table")


@dataclass(frozen=True)
class ParquetShard:
    """Some row groups of a file.

    Attributes:
      first: number of the first row.
      prefix: of the ids that are made of row numbers.
      own_ids: column with an id for each record, "" if there is none.
      root: folder that paths are relative to, for rows without bytes.
    """

    file: str
    stamp: str
    groups: tuple[int, ...]
    first: int
    weight: int
    prefix: str
    own_ids: str
    root: str
    media: str
    questions: bool
    split: str
    tar: Tar | None = None

    def read(self) -> Iterator[tuple[int, Item | Skip]]:
        """Neighbouring rows with the same picture become one record."""
        last: Item | None = None
        for number, found in self._rows():
            if isinstance(found, Item) and found.question is None:
                if last is not None and last.media == found.media:
                    last.texts.extend(found.texts)
                    continue
                if last is not None:
                    yield number, last
                last = found
            elif isinstance(found, Item):
                yield number, found
            else:
                if last is not None:
                    yield number, last
                    last = None
                yield number, found
        if last is not None:
            yield self.weight, last

    def _rows(self) -> Iterator[tuple[int, Item | Skip]]:
        number = 0
        try:
            with _open(self.file) as opened:
                columns = _columns(opened.schema_arrow, (self.own_ids,))
                batches = opened.iter_batches(ROWS, row_groups=list(self.groups), columns=list(columns.values()))
                for batch in batches:
                    for row in batch.to_pylist():
                        found = self._item(row, self.first + number)
                        number += 1
                        if found is not None:
                            yield number - 1, found
        except FileNotFoundError:
            yield number, Skip(self.file, "missing file")
        except DAMAGED:
            yield number, Skip(f"{self.file}, row {self.first + number}", "damaged table")

    def _item(self, row: dict[str, Any], number: int) -> Item | Skip | None:
        where = f"{self.file}, row {number}"
        row = {name.strip().lower(): value for name, value in row.items()}
        if fields.split_of(row) not in (None, fields.canonical(self.split)):
            return None
        try:
            found = fields.parse(row)
            if self.questions and found.question is None:
                raise Fault("no question")
            media = found.source
            if isinstance(media, str):
                limit = transforms.MAX_BYTES if self.media == "image" else listing.MAX_VIDEO_BYTES
                media = paths.read_file(self.root, paths.relative(media, self.root), limit)
        except Fault as fault:
            return Skip(where, str(fault))
        except (OSError, ValueError):
            return Skip(where, "missing file")
        own = fields.identifier(row.get(self.own_ids)) if self.own_ids else None
        return Item(
            where, own or f"{self.prefix}/{number}", media, found.texts, found.question, faults=tuple(found.faults)
        )


def plan(files: list[str], options: Options) -> Plan:
    """Puts neighbouring row groups into one shard, up to `listing.SHARD` rows."""
    opened = {}
    for file in files:
        with contextlib.suppress(*DAMAGED):
            opened[file] = _open(file)
    kinds = {_media(one.schema_arrow)[0] for one in opened.values()}
    asks = {"question" in _columns(one.schema_arrow) for one in opened.values()}
    if len(kinds) > 1 or len(asks) > 1:
        raise UserError("some of the Parquet files hold other media than the others, or questions: prepare them apart")
    (media,), (questions,) = kinds, asks
    own_ids = _own_ids(opened, questions)
    stems = listing.distinct([posixpath.splitext(posixpath.basename(file))[0] for file in files])
    shards: list[Shard] = []
    for file, stem in zip(files, stems, strict=True):
        if file not in opened:
            shards.append(ParquetShard(file, "", (), 0, 1, stem, own_ids, "", media, questions, options.split))
            continue
        metadata = opened[file].metadata
        sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        root = options.images or posixpath.dirname(file)
        groups: list[int] = []
        first = 0
        for number in range(len(sizes)):
            groups.append(number)
            count = sum(sizes[group] for group in groups)
            if number + 1 == len(sizes) or count + sizes[number + 1] > listing.SHARD:
                shards.append(
                    ParquetShard(
                        *(file, paths.stamp(file), tuple(groups), first, count, stem),
                        *(own_ids, root, media, questions, options.split),
                    )
                )
                first, groups = first + count, []
        opened[file].close()
    return Plan(media, questions, shards)


def _own_ids(opened: dict[str, pq.ParquetFile], questions: bool) -> str:
    """The column with ids, if every row of every file has one of its own; "" otherwise."""
    names = fields.QUESTION_ID if questions else fields.IMAGE_ID
    for name in names:
        chunks = []
        try:
            for one in opened.values():
                inside = {column.strip().lower(): column for column in one.schema_arrow.names}
                chunks += one.read(columns=[inside[name]]).column(0).chunks
            ids = pa.chunked_array(chunks)
        except (KeyError, *DAMAGED):
            continue
        kind = ids.type
        whole = pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if whole and ids.null_count == 0 and pc.count_distinct(ids).as_py() == len(ids):
            values = Counter(map(fields.identifier, ids.to_pylist())) if not pa.types.is_integer(kind) else {}
            return "" if None in values else name
    return ""
