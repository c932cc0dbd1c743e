"""Opens Parquet files, and finds the columns that are used and the one with the encoded media."""

import os
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from simvlg_jax.data.readers import fields, paths

ROWS = 16  # read at a time, since each may hold a large picture
COLUMNS = (
    *(*fields.IMAGE, *fields.VIDEO, *fields.CAPTION, *fields.QUESTION, *fields.ANSWER, *fields.SPLIT),
    *(*fields.GROUP, *fields.CHOICES, *fields.CORRECT, *fields.REVERSE),
)
DAMAGED = (OSError, pa.ArrowException, ValueError, MemoryError)


class Media(NamedTuple):
    """The column with encoded media.

    Attributes:
      kind: "image" or "video".
      column: its name in the file.
      has_paths: whether it is a struct that also has a path.
    """

    kind: str
    column: str
    has_paths: bool


def open_file(file: str) -> pq.ParquetFile:
    """Verifies the checksums of pages where the file has them. Raises one of DAMAGED if it is no Parquet file."""
    data = epath.Path(file).open("rb") if paths.is_remote(file) else os.fspath(file)
    return pq.ParquetFile(data, page_checksum_verification=True)


def columns_of(schema: pa.Schema, extra: tuple[str, ...] = ()) -> dict[str, str]:
    """Name of each column that is used, in lower case -> its name in the file."""
    return {name.strip().lower(): name for name in schema.names if name.strip().lower() in (*COLUMNS, *extra)}


def media_of(schema: pa.Schema) -> Media | None:
    """The column with encoded media, None if there is none."""
    columns = columns_of(schema)
    for media, names in (("video", fields.VIDEO), ("image", fields.IMAGE)):
        name = fields.find(columns, names)
        if name is not None:
            kind, path = schema.field(columns[name]).type, pa.null()
            if pa.types.is_struct(kind):
                inner = {kind.field(number).name: kind.field(number).type for number in range(kind.num_fields)}
                kind, path = inner.get("bytes", pa.null()), inner.get("path", pa.null())
            if any(test(kind) for test in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)):
                return Media(media, columns[name], pa.types.is_string(path) or pa.types.is_large_string(path))
    return None
