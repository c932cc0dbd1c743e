"""Reads pictures at random from tars, at the places that an index names."""

import functools
import io
import os

from etils import epath

from simvlg_jax.data.index import Row, Tar
from simvlg_jax.data.read_ahead import read_ahead

OPEN_FILES = 128  # per process


class TarReader:
    """Encoded bytes of members of tars, from several threads or processes."""

    def __init__(self, tars: list[Tar]):
        self._tars = tars
        self._open = functools.lru_cache(OPEN_FILES)(_open)

    def __reduce__(self) -> tuple:
        return TarReader, (self._tars,)

    def read(self, row: Row) -> bytes:
        """Raises OSError if the tar is absent, has another size than when it was indexed, or cannot be read."""
        tar = self._tars[row.tar]
        if "://" in tar.path:
            with _open(tar) as file:  # a file of a bucket has one position, which threads cannot share
                file.seek(row.offset)
                picture = file.read(row.size)
        else:
            picture = os.pread(self._open(tar).fileno(), row.size, row.offset)
        if len(picture) < row.size:
            raise OSError(f"{tar.path} is truncated")
        return picture

    def read_ahead(self, first: Row, last: Row) -> None:
        """Starts to read all members from the first to the last in one sweep. Tars of a bucket are left alone."""
        for number in range(first.tar, last.tar + 1):
            tar = self._tars[number]
            start = first.offset if number == first.tar else 0
            stop = last.offset + last.size if number == last.tar else tar.size
            if "://" not in tar.path:
                read_ahead(tar.path, start, stop)


def _open(tar: Tar) -> io.RawIOBase:
    remote = "://" in tar.path
    file = epath.Path(tar.path).open("rb") if remote else open(tar.path, "rb", buffering=0)  # noqa: SIM115
    if file.seek(0, os.SEEK_END) != tar.size:
        file.close()
        raise OSError(f"{tar.path} has changed since it was indexed; prepare the data again")
    return file
