"""Finds the rows of Parquet files that are about one picture, which may be far apart or in several files.

Rows have the same picture if they have the same bytes and, where the files have paths, the same path. Paths are read
first, and then the bytes of the rows whose path occurs again, or that have none. What stays in memory is a digest of
each row, and the texts of rows that repeat a picture.
"""

import contextlib
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from simvlg_jax.data.readers import fields
from simvlg_jax.data.readers.parquet_file import DAMAGED, ROWS, columns_of, media_of
from simvlg_jax.data.skips import Fault

TEXT_ROWS = 2**12  # read at a time
PLACEHOLDER = b"\0"  # of a picture, in a row whose texts are read


class Repeats(NamedTuple):
    """Rows are numbered through all files.

    Attributes:
      texts: number of a picture's first row -> the texts of its other rows.
      others: the numbers of these other rows.
    """

    texts: dict[int, list[str]]
    others: set[int]


def find(files: Sequence[pq.ParquetFile], split: str) -> Repeats:
    """Rows without a good text, rows of another split, and rows that cannot be read are left alone."""
    starts = np.cumsum([0, *(file.metadata.num_rows for file in files)]).tolist()
    names, digests = (np.zeros((starts[-1], 2), np.uint64) for _ in range(2))  # 128 bits; 0 where there is none
    for start, file in zip(starts, files, strict=False):
        for number, digest in _names(file):
            names[start + number] = np.frombuffer(digest, np.uint64)
    unique = names.any(1) & (_firsts(names) < 0)
    for start, stop, file in zip(starts, starts[1:], files, strict=False):
        for number, digest in _pictures(file, ~unique[start:stop]):
            digests[start + number] = np.frombuffer(digest, np.uint64)
    firsts = _firsts(digests)
    repeats = Repeats({}, set())
    heads: dict[int, int] = {}  # first row of a picture -> its first row with a good text
    for start, stop, file in zip(starts, starts[1:], files, strict=False):
        for number, row in _texts(file, firsts[start:stop] >= 0):
            with contextlib.suppress(Fault):
                if fields.split_of(row) not in (None, fields.canonical(split)):
                    continue
                good = fields.parse(row).texts
                head = heads.setdefault(int(firsts[start + number]), start + number)
                if head != start + number:
                    repeats.texts.setdefault(head, []).extend(good)
                    repeats.others.add(start + number)
    return repeats


def _firsts(digests: np.ndarray) -> np.ndarray:
    """The number of the first row with the same digest, -1 if there is no other row or no digest; int64 (N,)."""
    order = np.lexsort(digests.T)  # stable: equal digests keep their order
    ordered = digests[order]
    new = np.ones(len(order), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(1)
    run = np.cumsum(new) - 1
    repeated = (np.bincount(run)[run] > 1) & ordered.any(1)
    firsts = np.empty(len(order), np.int64)
    firsts[order] = np.where(repeated, order[new][run], -1)
    return firsts


def _digest(path: str, data: pa.Buffer | bytes = b"") -> bytes:
    digest = blake2b(path.encode(), digest_size=16)
    digest.update(b"\0")
    digest.update(data)
    return digest.digest()


def _groups(file: pq.ParquetFile, wanted: np.ndarray | None = None) -> Iterator[tuple[int, int]]:
    """Number and first row of the row groups with a wanted row."""
    start = 0
    for group in range(file.metadata.num_row_groups):
        stop = start + file.metadata.row_group(group).num_rows
        if wanted is None or wanted[start:stop].any():
            yield group, start
        start = stop


def _names(file: pq.ParquetFile) -> Iterator[tuple[int, bytes]]:
    """Number of each row that has a path, and the path's digest. Ends where the file is damaged."""
    media = media_of(file.schema_arrow)
    if not media.has_paths:
        return
    with contextlib.suppress(*DAMAGED):
        for group, start in _groups(file):
            column = file.read_row_group(group, columns=[f"{media.column}.path"]).column(0)
            for number, path in enumerate(pc.struct_field(column, "path").to_pylist(), start):
                if path:
                    yield number, _digest(path)


def _pictures(file: pq.ParquetFile, wanted: np.ndarray) -> Iterator[tuple[int, bytes]]:
    """Number of each wanted row that has a picture, and its digest. Ends where the file is damaged."""
    media = media_of(file.schema_arrow)
    with contextlib.suppress(*DAMAGED):
        for group, number in _groups(file, wanted):
            for batch in file.iter_batches(ROWS, row_groups=[group], columns=[media.column]):
                column = batch.column(0)
                is_struct = pa.types.is_struct(column.type)
                names = pc.struct_field(column, "path") if media.has_paths else [None] * len(column)
                for data, name in zip(pc.struct_field(column, "bytes") if is_struct else column, names, strict=True):
                    buffer, path = data.as_buffer(), name.as_py() if name is not None else None
                    if wanted[number] and (buffer or path):
                        yield number, _digest(path or "", buffer or b"")
                    number += 1


def _texts(file: pq.ParquetFile, wanted: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and content of the wanted rows, without their pictures. Ends where the file is damaged."""
    media = media_of(file.schema_arrow).column
    names = {column: name for name, column in columns_of(file.schema_arrow).items() if column != media}
    with contextlib.suppress(*DAMAGED):
        for group, number in _groups(file, wanted):
            for batch in file.iter_batches(TEXT_ROWS, row_groups=[group], columns=list(names)):
                for row in batch.to_pylist():
                    if wanted[number]:
                        found = {names[column]: value for column, value in row.items()}
                        yield number, found | {media.strip().lower(): PLACEHOLDER}
                    number += 1
