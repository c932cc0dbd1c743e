"""Paths of sources, local or in a bucket: patterns, listing, and reading files that may not leave their folder."""

import itertools
import os
import posixpath
import re
import stat
from collections.abc import Iterator
from datetime import datetime
from typing import NamedTuple

from etils import epath

from simvlg_jax.data.skips import Fault
from simvlg_jax.utils.errors import UserError

BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


class File(NamedTuple):
    """A file below a folder.

    Attributes:
      path: relative to the folder.
      stamp: size and modification time.
    """

    path: str
    stamp: str


def is_remote(path: str) -> bool:
    return "://" in path


def expand(source: str) -> list[str]:
    """Returns the paths that a source names: {00..12} and {a,b} are expanded, and local paths become absolute."""
    if not is_remote(source):
        source = os.path.abspath(source)
        if os.path.exists(source):
            return [source]
    pieces, last = [], 0
    for match in BRACES.finditer(source):
        first, stop, words = match.groups()
        if words is not None:
            choices = words.split(",")
        else:
            choices = [f"{number:0{len(first)}d}" for number in range(int(first), int(stop) + 1)]
        pieces += [[source[last : match.start()]], choices]
        last = match.end()
    return ["".join(parts) for parts in itertools.product(*pieces, [source[last:]])]


def stamp(path: str) -> str:
    """Size and time of a file. Raises OSError if it is absent."""
    if is_remote(path):
        about = epath.Path(path).stat()
        return f"{about.length} {about.mtime}"
    about = os.stat(path)
    return f"{about.st_size} {about.st_mtime_ns}"


def walk(folder: str) -> Iterator[File]:
    """Yields all files below a folder, in no order. Links to folders are not followed."""
    if is_remote(folder):
        import fsspec  # Late: local paths do not need it.

        system, root = fsspec.core.url_to_fs(folder)
        for path, about in system.find(root, detail=True).items():
            time = about.get("mtime") or about.get("updated") or about.get("LastModified") or ""
            time = time.isoformat() if isinstance(time, datetime) else time
            yield File(path[len(root) :].lstrip("/"), f"{about['size']} {time}")
        return
    folders = [""]
    while folders:
        here = folders.pop()
        try:
            with os.scandir(os.path.join(folder, here)) as entries:
                for entry in entries:
                    path = os.path.join(here, entry.name)
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(path)
                    else:
                        about = entry.stat(follow_symlinks=False)
                        yield File(path, f"{about.st_size} {about.st_mtime_ns}")
        except OSError as error:
            raise UserError(f"cannot list {os.path.join(folder, here)}: {error.strerror}") from error


def first_files(folder: str, count: int = 20_000) -> list[str]:
    """Returns the paths of some files below a folder, enough to recognise its format."""
    return [file.path for file in itertools.islice(walk(folder), count)]


def relative(name: str, root: str) -> str:
    """Returns the normalised path of a name below `root`. Raises Fault if it leads out of it."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name):
        if not name.startswith(f"{root}/"):
            raise Fault("an address, not a file")
        name = name[len(root) + 1 :]
    elif posixpath.isabs(name):
        if is_remote(root):
            raise Fault("outside")
        name = posixpath.relpath(posixpath.normpath(name), root)
    path = posixpath.normpath(name)
    if path.split("/")[0] == "..":
        raise Fault("outside")
    return path


def read_file(root: str, path: str, limit: int) -> bytes:
    """Reads a file that is below `root` also when links are followed.

    Raises Fault if it is outside of `root`, not a regular file, empty, or larger than `limit` bytes; OSError or
    ValueError if it cannot be opened.
    """
    if is_remote(root):
        file = epath.Path(root) / path
        size = file.stat().length
        _check_size(size, limit)
        return file.read_bytes()
    whole = os.path.join(root, path)
    true_root = os.path.realpath(root)
    if os.path.commonpath([true_root, os.path.realpath(whole)]) != true_root:
        raise Fault("outside")
    number = os.open(whole, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe would block
    with open(number, "rb") as opened:
        about = os.fstat(number)
        if not stat.S_ISREG(about.st_mode):
            raise Fault("not a file")
        _check_size(about.st_size, limit)
        return opened.read(limit)


def _check_size(size: int, limit: int) -> None:
    if size == 0:
        raise Fault("empty file")
    if size > limit:
        raise Fault("too large")
