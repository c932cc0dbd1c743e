"""Examples that a plan lists by path: rows become examples, and shards of examples are read."""

import contextlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from etils import epath

from simvlg_jax.data import transforms
from simvlg_jax.data.captions import well_formed
from simvlg_jax.data.extras import NONE, Extras
from simvlg_jax.data.index import Tar
from simvlg_jax.data.readers import fields, paths, texts
from simvlg_jax.data.readers.fields import Fields
from simvlg_jax.data.readers.reader import Example, Item, Plan, Skip
from simvlg_jax.data.skips import Fault, reason
from simvlg_jax.utils.files import atomic_write

SHARD = 4096  # most examples of a shard
SMALLEST = 64  # a data set of fewer examples is one shard
PARTS = 32  # of a data set with at least SMALLEST * PARTS examples, so that several processes have work
MAX_VIDEO_BYTES = 2**30


class Listed(NamedTuple):
    """A row of a list. `where` names the row, and `root` is the number of the folder that its path is relative to."""

    where: str
    root: int
    fields: Fields


def plan_of(rows: Iterable[Listed | Skip], roots: list[str]) -> Plan:
    """Groups rows by picture, in the order of first appearance; each question is an example of its own."""
    entries: list[Example | Skip] = []
    places: dict[int, dict[str, int]] = defaultdict(dict)  # root -> path -> place in the entries
    kinds = Counter()
    for row in rows:
        if isinstance(row, Skip):
            entries.append(row)
            continue
        where, root, fields = row
        entries += [Skip(where, fault) for fault in fields.faults]
        try:
            path = paths.relative(fields.source, roots[root])
        except Fault as fault:
            entries.append(Skip(where, str(fault)))
            continue
        place = len(entries)
        if fields.question is None:
            place = places[root].setdefault(path, place)
        if place < len(entries):
            first = entries[place]
            own = first.id if first.id == fields.id else ""
            extras = first.extras if first.extras != NONE else fields.extras
            entries[place] = first._replace(id=own, texts=(*first.texts, *fields.texts), extras=extras)
            continue
        example = Example(where, root, path, fields.id or "", tuple(fields.texts), fields.question)
        entries.append(example._replace(extras=fields.extras))
        kinds[fields.media, fields.question is not None] += 1
    places.clear()
    # A list with videos is a list of videos, and one with questions is a list of questions.
    media = "video" if any(kind == "video" for kind, _ in kinds) else "image"
    asks = any(asked for _, asked in kinds)
    for place, entry in enumerate(entries):
        if isinstance(entry, Example) and asks and entry.question is None:
            entries[place] = Skip(entry.where, "no question")
    _name(entries)
    return Plan(media, asks, entries=entries, roots=roots)


def _name(entries: list[Example | Skip]) -> None:
    """Leaves the ids of the source if every record has one of its own, and replaces them by paths otherwise."""
    own = [entry.id for entry in entries if isinstance(entry, Example)]
    if "" not in own and len(set(own)) == len(own):
        return
    names = []
    questions: Counter[tuple[int, str]] = Counter()  # of a picture
    for entry in entries:
        if isinstance(entry, Example):
            number = ""
            if entry.question is not None:
                questions[entry.root, entry.path] += 1
                number = f"#{questions[entry.root, entry.path]}"
            names.append(well_formed(entry.path) + number)
    ids = iter(distinct(names))
    for place, entry in enumerate(entries):
        if isinstance(entry, Example):
            entries[place] = entry._replace(id=next(ids))


def distinct(names: list[str]) -> list[str]:
    """Appends "~2", "~3", ... to names that occur again."""
    taken, result = set(names), []
    if len(taken) == len(names):
        return names
    seen: Counter[str] = Counter()
    for name in names:
        seen[name] += 1
        if seen[name] == 1:
            result.append(name)
            continue
        number = seen[name]
        while f"{name}~{number}" in taken:
            number += 1
        taken.add(f"{name}~{number}")
        result.append(f"{name}~{number}")
    return result


@dataclass(frozen=True)
class ListedShard:
    """Some lines of the file that `spool` wrote.

    Attributes:
      start, size: bytes of the file.
      weight: number of lines.
    """

    file: str
    start: int
    size: int
    weight: int
    roots: tuple[str, ...]
    media: str
    tar: Tar | None = None

    def read(self) -> Iterator[tuple[int, Item | Skip]]:
        with epath.Path(self.file).open("rb") as file:
            file.seek(self.start)
            lines = file.read(self.size).splitlines()
        for number, line in enumerate(lines):
            values = json.loads(line)
            entry = Skip(*values) if len(values) == len(Skip._fields) else self._item(Example(*values))
            if entry is not None:
                yield number, entry

    def _item(self, example: Example) -> Item | Skip | None:
        root = self.roots[example.root]
        try:
            if example.texts is not None:
                found = Described(list(example.texts), (), Extras(*example.extras))
            elif (found := beside(root, example)) is None:
                return None
            limit = transforms.MAX_BYTES if self.media == "image" else MAX_VIDEO_BYTES
            media = paths.read_file(root, example.path, limit)
        except (Fault, OSError, ValueError) as error:
            # A name with NUL or half a character raises ValueError: no such file exists.
            return Skip(example.where, "missing file" if isinstance(error, ValueError) else reason(error))
        return Item(example.where, example.id, media, found.texts, example.question, 0, found.faults, found.extras)


class Described(NamedTuple):
    """What is said of one picture or video: good captions, the faults of others, and what evaluations use besides."""

    texts: list[str]
    faults: tuple[str, ...] = ()
    extras: Extras = NONE


def beside(root: str, example: Example) -> Described | None:
    """What the file beside a picture says; None if the file belongs to no picture.

    Raises Fault or OSError if there is no good caption.
    """
    if not example.beside:
        raise Fault("no caption")
    is_json = example.beside.lower().endswith(".json")
    data = paths.read_file(root, example.beside, texts.MAX_BYTES)
    if not example.path:
        content = texts.parse_json(data) if is_json else None
        if is_json and not (isinstance(content, dict) and content.keys() & {"caption", "text", "url", "status"}):
            return None
        raise Fault("no picture")
    return described_by(data, is_json)


def described_by(data: bytes, is_json: bool) -> Described:
    """What a JSON file says, or the first line of a text file.

    Raises Fault if there is no good one.
    """
    if not is_json:
        return Described([texts.checked(texts.first_line(texts.decode(data)))])
    content = texts.parse_json(data)
    if not isinstance(content, dict):
        raise Fault("wrong type")
    value = next((content[name] for name in ("caption", "captions", "text") if content.get(name) is not None), None)
    good, faults = texts.sift(texts.as_list(value))
    if not good:
        raise Fault(faults[0])
    return Described(good, tuple(faults), fields.beside(content))


def spool(plan: Plan, path: epath.Path) -> None:
    """Replaces the entries of a plan by shards, which read them from a file; writes that file unless it exists."""
    count = len(plan.entries)
    size = min(SHARD, max(SMALLEST, -(-count // PARTS)))
    position = 0
    with contextlib.ExitStack() as stack:
        file = None
        if not path.exists():
            file = stack.enter_context(stack.enter_context(atomic_write(path)).open("wb"))
        for first in range(0, count, size):
            part = plan.entries[first : first + size]
            data = "".join(json.dumps(entry) + "\n" for entry in part).encode()
            if file is not None:
                file.write(data)
            plan.shards.append(
                ListedShard(os.fspath(path), position, len(data), len(part), tuple(plan.roots), plan.media)
            )
            position += len(data)
    plan.entries = []
