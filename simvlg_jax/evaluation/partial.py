"""Keeps the finished batches of an evaluation in a file, so that an interrupted evaluation goes on."""

import json
from pathlib import Path

import jax

from simvlg_jax.parallel.collectives import text_of_first


class Partial:
    """The finished batches of one evaluation, in order.

    Process 0 reads and writes the file, and gives the others what it read.

    Args:
      path: the file, of JSON lines. The first is the identity, each other one a batch.
      identity: JSON of what determines the results. Batches of another identity are dropped.

    Attributes:
      batches: those that are finished, first those of an interrupted evaluation.
    """

    def __init__(self, path: Path, identity: dict):
        self._path, self._writes = path, jax.process_index() == 0
        identity = json.loads(json.dumps(identity))
        found = json.dumps(_read(path, identity) if self._writes else [])
        self.batches: list[dict] = json.loads(text_of_first(found))
        if self._writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._rewrite(identity)

    def _rewrite(self, identity: dict) -> None:
        """Drops a line that was cut off, and the batches of another identity."""
        partial = self._path.with_name(f"{self._path.name}.new")
        partial.write_text("".join(json.dumps(line) + "\n" for line in [identity, *self.batches]))
        partial.replace(self._path)

    def add(self, batch: dict) -> None:
        """Appends a finished batch."""
        self.batches.append(batch)
        if self._writes:
            with self._path.open("a") as file:  # closed after each line: a mounted bucket stores closed files only
                file.write(json.dumps(batch) + "\n")

    def remove(self) -> None:
        """Deletes the file, once the results are written."""
        if self._writes:
            self._path.unlink(missing_ok=True)


def _read(path: Path, identity: dict) -> list[dict]:
    """The batches of a file of this identity, up to the first line that is damaged; [] if there is none."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines[1:] if lines and lines[0] == identity else []
