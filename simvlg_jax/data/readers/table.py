"""Tables: JSONL, CSV, TSV and Parquet, Hugging Face's imagefolder, and our own captions.jsonl.

Columns are found by their names (`fields`). A picture is a path relative to the folder of its table, or its encoded
bytes (Parquet, see `parquet`).
"""

import csv
import io
import itertools
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from simvlg_jax.data.readers import fields, lavis, listing, parquet, paths, texts
from simvlg_jax.data.readers.reader import Options, Plan, Skip
from simvlg_jax.data.skips import Fault
from simvlg_jax.data.sources import folder
from simvlg_jax.utils.errors import UserError

LINES, COLUMNS, PARQUET = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv"), (".parquet", ".pq")
DELIMITERS = {".csv": ",;|\t", ".tsv": "\t"}
KNOWN = (*fields.IMAGE, *fields.VIDEO, *fields.ADDRESS)
# Of Hugging Face: train-00000-of-00002.parquet, or a folder train/.
SPLIT_NAME = re.compile(r"(?:^|/)(train|training|test|validation|valid|val|dev)(?=[-_./])")

csv.field_size_limit(2**24)


def recognises(source: epath.Path) -> bool:
    if source.is_dir():
        return bool(_tables(paths.first_files(os.fspath(source))))
    return source.name.lower().endswith((*LINES[:2], *COLUMNS, *PARQUET))


def plan(sources: Iterable[str], options: Options) -> Plan:
    """Raises UserError if no table has a column with pictures, or if some tables hold bytes and others paths.

    The rows of a list without a split, in a list where others have one, are divided as `data.sources.folder` does.
    """
    files = [file for source in sources for file in _files(source, options.split)]
    holds = {file: parquet.holds_bytes(file) if file.lower().endswith(PARQUET) else False for file in files}
    if True in holds.values():
        other = next((file for file in files if holds[file] is False), None)
        if other is not None:
            raise UserError(f"{other} does not hold encoded pictures, as other tables do: prepare them separately")
        return parquet.plan(files, options)
    roots = list(dict.fromkeys(options.images or posixpath.dirname(file) for file in files))

    def rows() -> Iterator[listing.Listed | Skip]:
        for file in files:
            root = roots.index(options.images or posixpath.dirname(file))
            yield from _of_split(file, root, options)

    return listing.plan_of(rows(), roots)


def _tables(names: list[str]) -> list[str]:
    """The tables among files of a folder: the lists of captions if there are any, else all files of these formats."""
    lists = [name for name in names if posixpath.basename(name) in (*folder.FILES, "metadata.csv", "metadata.parquet")]
    return lists or [name for name in names if name.lower().endswith((*LINES[:2], *COLUMNS, *PARQUET))]


def _files(source: str, split: str) -> list[str]:
    """The tables below a folder. If some are named after splits, only those of the split."""
    if not epath.Path(source).is_dir():
        return [source]
    names = _tables(sorted(file.path for file in paths.walk(source)))
    if not names:
        raise UserError(f"{source} holds no table: expected captions.jsonl, metadata.jsonl, *.csv, *.parquet, ...")
    splits = {name: SPLIT_NAME.search(name) for name in names}
    if any(splits.values()):
        wanted = fields.canonical(split)
        chosen = [
            name
            for name, found in splits.items()
            if found and fields.canonical({"training": "train"}.get(found[1], found[1])) == wanted
        ]
        if not chosen:
            raise UserError(f'{source} has no table of the split "{split}", only {", ".join(names[:3])}')
        names = chosen
    return [posixpath.join(source, name) for name in names]


def _of_split(file: str, root: int, options: Options) -> Iterator[listing.Listed | Skip]:
    """Rows of a split. Rows that name none follow others of the same picture, or the hash of the picture's name."""
    wanted = fields.canonical(options.split)
    named: dict[str, str] = {}
    for where, row in _rows(file):  # the file is read twice, since all of its rows take much memory
        if isinstance(row, dict) and any(name.strip().lower() in fields.SPLIT for name in row):
            for found in lavis.listed(row, where, root, unlabelled=options.unlabelled):
                if isinstance(found, listing.Listed) and found.fields.split:
                    named.setdefault(posixpath.normpath(found.fields.source), found.fields.split)
    for where, row in _rows(file):
        if isinstance(row, Fault):
            yield Skip(where, str(row))
            continue
        for found in lavis.listed(row, where, root, unlabelled=options.unlabelled):
            if isinstance(found, listing.Listed) and named:
                image = posixpath.normpath(found.fields.source)
                if (found.fields.split or named.get(image) or folder.split_of(image)) != wanted:
                    continue
            yield found


def _rows(file: str) -> Iterator[tuple[str, Any]]:
    """Rows of a table of paths, whatever their split, with their places; a Fault for each that cannot be read."""
    suffix = posixpath.splitext(file)[1].lower()
    read = _csv if suffix in COLUMNS else parquet.rows if suffix in PARQUET else _jsonl
    try:
        yield from read(file)
    except OSError as error:
        yield file, Fault(f"cannot be read: {error.strerror}" if error.strerror else "damaged table")


def _jsonl(file: str) -> Iterator[tuple[str, Any]]:
    with epath.Path(file).open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file}, line {number}"
            if not line.strip():
                continue
            try:
                yield where, texts.parse_json(line)
            except Fault as fault:
                yield where, fault


def _csv(file: str) -> Iterator[tuple[str, Any]]:
    with epath.Path(file).open("rb") as data:
        # Bytes that are not UTF-8 become half characters, which a CSV file cannot hold otherwise.
        lines = io.TextIOWrapper(data, "utf-8-sig", "surrogateescape", newline="")
        first = next(lines, "")
        choices = DELIMITERS[posixpath.splitext(file)[1].lower()]
        delimiter = next((mark for mark in choices if _header(first, mark)), choices[0])
        rows = csv.reader(itertools.chain([first], lines), delimiter=delimiter)
        names: list[str] | None = None
        while True:
            where = f"{file}, line {rows.line_num + 1}"
            try:
                row = next(rows, None)
            except csv.Error:
                yield where, Fault("not CSV")
                continue
            if row is None:
                return
            if names is None:
                names = [name.strip().lower() for name in row]
                _check_header(file, names)
            elif any("\udc80" <= character <= "\udcff" for value in row for character in value):
                yield where, Fault("not UTF-8")
            elif len(row) > len(names):
                yield where, Fault("too many columns")
            elif row:
                yield where, {name: _cell(name, value) for name, value in zip(names, row, strict=False)}


def _header(line: str, delimiter: str) -> bool:
    try:
        names = next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return False
    return len(names) > 1 and fields.find([name.strip().lower() for name in names], KNOWN) is not None


def _check_header(file: str, names: list[str]) -> None:
    if fields.find(names, (*fields.IMAGE, *fields.VIDEO)) is None:
        address = fields.find(names, fields.ADDRESS)
        problem = (
            f'its column "{address}" holds addresses, which are not fetched: download them first, for example with '
            "img2dataset, and prepare its output"
            if address
            else f"name the column of pictures one of {', '.join(fields.IMAGE)} in the first line"
        )
        raise UserError(f"{file} has no column with pictures; {problem}")


def _cell(name: str, value: str) -> Any:
    """A cell of a CSV file. Several captions, answers or choices are a JSON list."""
    if name in (*fields.CAPTION, *fields.ANSWER, *fields.CHOICES) and value.startswith("["):
        try:
            values = texts.parse_json(value.encode())
        except Fault:
            return value
        if isinstance(values, list) and values and all(isinstance(text, str) for text in values):
            return values
    return int(value) if name in fields.CORRECT and value.isdecimal() else value
