"""The folder of an unfinished split: what is done already, and which source it is from."""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from etils import epath

from simvlg_jax.data.readers import paths
from simvlg_jax.utils.errors import TRY_AGAIN, UserError
from simvlg_jax.utils.files import atomic_write

THREADS = 32  # that read reports, for the sake of buckets


class Report(NamedTuple):
    """What a finished shard holds.

    Attributes:
      bytes: of the records.
      skipped: reason -> how many.
    """

    written: int
    bytes: int
    skipped: dict[str, int]


class Staging:
    """Paths of the unfinished split of an output folder."""

    def __init__(self, output: str, split: str):
        self.output = output
        self.folder = epath.Path(output) / f".prepare-{split}"
        self.examples = self.folder / "examples.jsonl"
        self._state = self.folder / "state.json"

    def index(self, number: int) -> epath.Path:
        return self.folder / f"index-{number:05d}.arrow"

    def skipped(self, number: int) -> epath.Path:
        return self.folder / f"skipped-{number:05d}.jsonl"

    def report(self, number: int) -> epath.Path:
        return self.folder / f"report-{number:05d}.json"

    def read_state(self) -> dict:
        """{"fingerprint", "name"}, or {} if nothing was begun."""
        try:
            return json.loads(self._state.read_text())
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def write_state(self, fingerprint: str, name: str) -> None:
        write_text(self._state, json.dumps({"fingerprint": fingerprint, "name": name}))

    def done(self) -> dict[int, Report]:
        """Reports of the finished shards, by number."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.exists() else []
        numbers = sorted(int(name[len("report-") : -len(".json")]) for name in names if name.startswith("report-"))
        with ThreadPoolExecutor(THREADS) as threads:
            texts = threads.map(lambda number: self.report(number).read_text(), numbers)
            return {number: Report(*json.loads(text)) for number, text in zip(numbers, texts, strict=True)}

    @contextlib.contextmanager
    def attempt(self) -> Iterator[Path]:
        """A local folder of this attempt at a shard, so that one that is wrongly thought dead does no harm."""
        where = None if paths.is_remote(self.output) else self.folder
        with tempfile.TemporaryDirectory(prefix="attempt-", dir=where, ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    def remove(self) -> None:
        if self.folder.exists():
            self.folder.rmtree()


def publish(source: Path, target: epath.Path) -> None:
    """Moves a local file to its place, where it appears whole."""
    if paths.is_remote(os.fspath(target)):
        with source.open("rb") as data, target.open("wb") as file:
            shutil.copyfileobj(data, file, 2**24)
    else:
        os.replace(source, target)


def write_text(path: epath.Path, text: str) -> None:
    """Writes a text file, which appears whole."""
    with atomic_write(path) as partial:
        partial.write_text(text)


@contextlib.contextmanager
def locked(output: str) -> Iterator[None]:
    """Makes an output folder and keeps other processes of this machine from preparing into it.

    A folder that is still empty at the end is removed again. Buckets, and disks without locks, are not protected.

    Raises UserError if the folder cannot be made, or if another process prepares into it (status TRY_AGAIN).
    """
    if paths.is_remote(output):
        yield
        return
    try:
        os.makedirs(output, exist_ok=True)
        folder = os.open(output, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"cannot write to {output} ({error.strerror}): choose another --output") from error
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process prepares data into {output}: wait for it, or choose another --output", TRY_AGAIN
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(output)  # fails unless it is empty
        os.close(folder)
