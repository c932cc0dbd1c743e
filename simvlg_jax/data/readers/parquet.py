"""Parquet files with the encoded pictures in them, as Hugging Face's data sets have them, or with paths of pictures."""

import contextlib
import posixpath
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from simvlg_jax.data import transforms
from simvlg_jax.data.index import Tar
from simvlg_jax.data.readers import fields, listing, paths, repeats
from simvlg_jax.data.readers.parquet_file import DAMAGED, ROWS, columns_of, media_of, open_file
from simvlg_jax.data.readers.reader import Item, Options, Plan, Shard, Skip
from simvlg_jax.data.skips import Fault
from simvlg_jax.utils.errors import UserError


def holds_bytes(file: str) -> bool | None:
    """Whether a column may hold encoded pictures. None if the file is damaged, which reading it reports."""
    try:
        with open_file(file) as opened:
            schema = opened.schema_arrow
    except DAMAGED:
        return None
    if media_of(schema) is None and fields.find(columns_of(schema), (*fields.IMAGE, *fields.VIDEO)) is None:
        raise UserError(
            f"{file} has no column with pictures (columns: {', '.join(schema.names)}); addresses are not fetched: "
            f"download them first, for example with img2dataset, or name the column one of {', '.join(fields.IMAGE)}"
        )
    return media_of(schema) is not None


def rows(file: str) -> Iterator[tuple[str, Any]]:
    """Rows of a file with paths, with their place; a Fault where the file is damaged."""
    number = 0
    try:
        with open_file(file) as opened:
            columns = columns_of(opened.schema_arrow, (*fields.IMAGE_ID, *fields.QUESTION_ID))
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
      more: number of a row -> the captions of other rows about its picture.
      others: the numbers of such rows, which are no records of their own.
      root: folder that paths are relative to, for rows without bytes.
      unlabelled: see `Options`.
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
    more: dict[int, list[str]] = field(default_factory=dict)
    others: frozenset[int] = frozenset()
    tar: Tar | None = None
    unlabelled: bool = field(default=False, repr=False)  # not in the fingerprint of a shard: it is an option

    def read(self) -> Iterator[tuple[int, Item | Skip]]:
        number = 0
        try:
            with open_file(self.file) as opened:
                columns = columns_of(opened.schema_arrow, (self.own_ids,))
                batches = opened.iter_batches(ROWS, row_groups=list(self.groups), columns=list(columns.values()))
                for batch in batches:
                    for row in batch.to_pylist():
                        for found in self._found(row, self.first + number):
                            yield number, found
                        number += 1
        except FileNotFoundError:
            yield number, Skip(self.file, "missing file")
        except DAMAGED:
            yield number, Skip(f"{self.file}, row {self.first + number}", "damaged table")

    def _found(self, row: dict[str, Any], number: int) -> Iterator[Item | Skip]:
        where = f"{self.file}, row {number}"
        row = {name.strip().lower(): value for name, value in row.items()}
        if fields.split_of(row) not in (None, fields.canonical(self.split)):
            return
        try:
            found = fields.parse(row, self.unlabelled)
            if number in self.others:
                yield from (Skip(where, fault) for fault in found.faults)
                return
            if self.questions and found.question is None:
                raise Fault("no question")
            media = found.source
            if isinstance(media, str):
                limit = transforms.MAX_BYTES if self.media == "image" else listing.MAX_VIDEO_BYTES
                media = paths.read_file(self.root, paths.relative(media, self.root), limit)
        except Fault as fault:
            yield Skip(where, str(fault))
            return
        except (OSError, ValueError):
            yield Skip(where, "missing file")
            return
        own = fields.identifier(row.get(self.own_ids)) if self.own_ids else None
        texts = found.texts + self.more.get(number, [])
        item = Item(where, own or f"{self.prefix}/{number}", media, texts, found.question, extras=found.extras)
        yield item._replace(faults=tuple(found.faults))


def plan(files: list[str], options: Options) -> Plan:
    """Puts neighbouring row groups into one shard, up to `listing.SHARD` rows."""
    opened = {}
    for file in files:
        with contextlib.suppress(*DAMAGED):
            opened[file] = open_file(file)
    kinds = {media_of(one.schema_arrow).kind for one in opened.values()}
    asks = {"question" in columns_of(one.schema_arrow) for one in opened.values()}
    if len(kinds) > 1 or len(asks) > 1:
        raise UserError("some of the Parquet files hold other media than the others, or questions: prepare them apart")
    (media,), (questions,) = kinds, asks
    found = repeats.Repeats({}, set()) if questions else repeats.find(list(opened.values()), options.split)
    own_ids = _own_ids(opened, questions, found.others)
    stems = listing.distinct([posixpath.splitext(posixpath.basename(file))[0] for file in files])
    shards: list[Shard] = []
    start = 0  # number of the file's first row
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
                own = range(first, first + count)
                shards.append(
                    ParquetShard(
                        *(file, paths.stamp(file), tuple(groups), first, count, stem),
                        *(own_ids, root, media, questions, options.split),
                        more={row: found.texts[start + row] for row in own if start + row in found.texts},
                        others=frozenset(row for row in own if start + row in found.others),
                        unlabelled=options.unlabelled,
                    )
                )
                first, groups = first + count, []
        start += sum(sizes)
        opened[file].close()
    return Plan(media, questions, shards)


def _own_ids(opened: dict[str, pq.ParquetFile], questions: bool, others: set[int]) -> str:
    """The column with ids, if every record of the files has one of its own; "" otherwise.

    Args:
      others: rows that are no records of their own, numbered through all files.
    """
    names = fields.QUESTION_ID if questions else fields.IMAGE_ID
    for name in names:
        chunks = []
        try:
            for one in opened.values():
                inside = {column.strip().lower(): column for column in one.schema_arrow.names}
                chunks += one.read(columns=[inside[name]]).column(0).chunks
            ids = pa.chunked_array(chunks)
            if others:
                records = np.ones(len(ids), bool)
                records[list(others)] = False
                ids = ids.filter(pa.array(records))
        except (KeyError, *DAMAGED):
            continue
        kind = ids.type
        whole = pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if whole and ids.null_count == 0 and pc.count_distinct(ids).as_py() == len(ids):
            values = Counter(map(fields.identifier, ids.to_pylist())) if not pa.types.is_integer(kind) else {}
            return "" if None in values else name
    return ""
