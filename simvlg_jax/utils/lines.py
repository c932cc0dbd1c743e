"""A file of JSON lines, one for each item, that an interrupted command goes on with."""

import fcntl
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from simvlg_jax.utils.errors import TRY_AGAIN, UserError
from simvlg_jax.utils.files import write_json

SETTINGS = ".settings.json"


def json_line(record: Mapping) -> str:
    """Returns one line of JSON. File names that are not valid UTF-8 are escaped, and reading gives them back."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"


class Lines:
    """The lines of a file. One process writes it at a time.

    FILE.settings.json beside it says what determines the lines.

    Args:
      path: the file. It and its folder are made if they are absent.
      settings: JSON of what determines the lines.
      key: of each line, names its item.
      items: without repeats; those that have no line yet are `left`.
      group: lines are written by so many. If any are left, a group of these items that was cut short is removed and
        done again, so that all groups are those of an uninterrupted command.

    Attributes:
      left: items without a line, in order.
      lines: number of lines in the file.
      failed: how many of them have an "error".

    Raises:
      UserError: the file cannot be written, another process writes it, it is of other settings, or a line before the
        last one is damaged. The file is left as it is.
    """

    def __init__(self, path: Path, settings: Mapping[str, object], key: str, items: Sequence[str], group: int):
        self._path, self._settings_path = path, Path(f"{path}{SETTINGS}")
        self._created = not path.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; name another file", 2) from error
        try:
            _lock(self._file, path)
            self._open(json.loads(json.dumps(settings)), key, items, group)
        except BaseException:
            self._file.close()
            raise

    def _open(self, settings: dict, key: str, items: Sequence[str], group: int) -> None:
        if self._path.stat().st_size:
            self._check(settings)
        else:
            write_json(self._settings_path, settings)
        self._file.seek(0)
        done, failures, ends = [], [], [0]
        for raw in self._file:
            if not raw.endswith(b"\n"):
                break  # it was cut off
            record = self._parse(raw, len(done) + 1, key)
            done.append(record[key])
            failures.append("error" in record)
            ends.append(ends[-1] + len(raw))
        cut_short = done[len(done) - len(done) % group :]
        if set(items).difference(done) and set(items).issuperset(cut_short):
            del done[len(done) - len(cut_short) :]
        self._file.truncate(ends[len(done)])
        self.lines, self.failed = len(done), sum(failures[: len(done)])
        done = set(done)
        self.left = [item for item in items if item not in done]

    def _parse(self, raw: bytes, number: int, key: str) -> dict:
        try:
            record = json.loads(raw)
            record[key]
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"line {number} of {self._path} is damaged: delete the line, or name another file", 2
            ) from None
        return record

    def _check(self, settings: dict) -> None:
        try:
            there = dict(json.loads(self._settings_path.read_text()))
        except (OSError, ValueError, TypeError):
            name = self._settings_path.name
            raise UserError(
                f"{self._path} exists, and no {name} beside it says how it was written; name another file", 2
            ) from None
        changed = [
            f"{name}: {there.get(name)!r} there, {settings.get(name)!r} now"
            for name in dict.fromkeys([*there, *settings])
            if there.get(name) != settings.get(name)
        ]
        if changed:
            raise UserError(
                f"{self._path} was written with other settings; name another file, or delete it:\n  "
                + "\n  ".join(changed),
                2,
            )

    def add(self, records: Iterable[Mapping]) -> None:
        """Appends the lines of a group."""
        records = list(records)
        self._file.write("".join(map(json_line, records)).encode())
        self._file.flush()
        self.lines += len(records)
        self.failed += sum("error" in record for record in records)

    def close(self) -> None:
        """Closes the file, and removes it if this command has made it and written no line."""
        if self._created and not self.lines:
            self._path.unlink(missing_ok=True)
            self._settings_path.unlink(missing_ok=True)
        self._file.close()


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process writes {path}: wait for it, or name another file", TRY_AGAIN) from None
    except OSError:  # a file system without locks
        pass
