"""A folder of the user's pictures with `captions.jsonl`, one JSON object per line.

    {"image": "cats/1.jpg", "caption": "a cat on a mat"}
    {"image": "cats/2.jpg", "caption": ["two cats", "cats asleep"], "split": "val"}

Pictures are named relative to the folder. Several lines may name the same picture; all their captions belong to it. A
line without "split" is in the split that another line of the same picture names. If no line names one, a hash of the
picture's name decides and puts 5 % of the pictures into val and 5 % into test. Hugging Face's imagefolder format
(`metadata.jsonl` with "file_name" and "text") is read as well.
"""

import functools
import hashlib
import json
import os
import posixpath
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from simvlg_jax.data import transforms
from simvlg_jax.data.captions import well_formed
from simvlg_jax.data.sources.source import Record, RecordInfo
from simvlg_jax.utils.errors import UserError, warn

FILES = ("captions.jsonl", "metadata.jsonl")
SPLITS = ("train", "val", "test")
HELD_OUT_PERCENT = 5  # of the pictures, for val and test each
EXAMPLE = '{"image": "cats/1.jpg", "caption": "a cat on a mat"}'


class Line(NamedTuple):
    number: int
    image: str  # normalised: "a.png" for "./a.png"
    captions: list[str]
    repaired: int  # number of captions that held half a character
    split: str | None


def split_of(image: str) -> str:
    """The split of a picture whose lines name none. It depends only on the picture's name."""
    percent = int.from_bytes(hashlib.sha256(image.encode()).digest()[:8]) * 100 / 2**64
    if percent < HELD_OUT_PERCENT:
        return "val"
    return "test" if percent < 2 * HELD_OUT_PERCENT else "train"


def _short(name: str) -> str:
    """Shortens a name for a message."""
    return well_formed(name if len(name) <= 100 else f"{name[:100]}...")


def _parse(text: str, number: int, file: Path, allow_outside: bool) -> Line:
    """Parses one line; raises UserError with file and line number."""
    where = f"{file}, line {number}"
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); a line looks like {EXAMPLE}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{where}: not a JSON object; a line looks like {EXAMPLE}")
    image = fields.get("image", fields.get("file_name"))
    captions = fields.get("caption", fields.get("text"))
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(image, str) or not image:
        raise UserError(f'{where}: no "image"; a line looks like {EXAMPLE}')
    if image != well_formed(image):
        raise UserError(f'{where}: the name "{_short(image)}" holds half a character (a lone surrogate)')
    image = posixpath.normpath(image)
    if not allow_outside and (posixpath.isabs(image) or image.split("/")[0] == ".."):
        raise UserError(
            f'{where}: "{_short(image)}" is outside of the folder; move the picture into {file.parent} and name it '
            "relative to that, or set data.allow_outside=True"
        )
    strings = isinstance(captions, list) and all(isinstance(text, str) and text.strip() for text in captions)
    if not captions or not strings:
        raise UserError(f'{where}: "caption" must be a text or a list of texts, none of them empty')
    split = fields.get("split") or None
    if split not in (None, *SPLITS):
        name = f' "{_short(split)}"' if isinstance(split, str) else ""
        raise UserError(f"{where}: unknown split{name}; known are {', '.join(SPLITS)}")
    repaired = [well_formed(caption) for caption in captions]
    return Line(number, image, repaired, sum(map(str.__ne__, captions, repaired)), split)


def _read(folder: Path, allow_outside: bool) -> list[Line]:
    path = next((folder / name for name in FILES if os.path.isfile(folder / name)), None)
    if path is None:
        problem = f"has no {FILES[0]}" if os.path.isdir(folder) else "is not a folder"
        raise UserError(f"{folder} {problem}; data.path must name a folder with pictures and {FILES[0]}: {EXAMPLE}")
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as lines:
            return [_parse(text, n, path, allow_outside) for n, text in enumerate(lines, 1) if text.strip()]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


_warn = functools.cache(warn)  # each warning once per process, since evaluation may open a split repeatedly


class FolderSource:
    """Reads the pictures of the folder `data.path`; a record's id is the picture's name.

    Symbolic links are followed, also out of the folder.

    Raises UserError if the file is absent or malformed, if pictures are absent, or if the split is empty. Warns of
    pictures that are in two splits and of half characters (lone surrogates) in captions.
    """

    SPLITS = SPLITS
    TEST_SPLITS = ("test",)

    def __init__(self, data_config: ConfigDict, split: str, training: bool = False):
        if not data_config.path:
            raise UserError(f'the data set "folder" needs data.path, a folder with pictures and {FILES[0]}', status=2)
        self._folder = Path(data_config.path)
        lines = _read(self._folder, data_config.get("allow_outside", False))
        named: dict[str, list[str]] = {}  # picture -> splits that its lines name
        for line in lines:
            if line.split:
                named.setdefault(line.image, []).append(line.split)
        self._warn_of_overlap(named, split)

        lines = [line for line in lines if (line.split or named.get(line.image, [split_of(line.image)])[0]) == split]
        if not lines:
            raise UserError(
                f'no picture of {self._folder} is in the split "{split}"; give some lines "split": "{split}"'
            )
        if repaired := sum(line.repaired for line in lines):
            _warn(
                f"{self._folder}: {repaired} captions for {split} hold half a character (a lone surrogate), "
                "which becomes \ufffd"
            )
        self._references: dict[str, list[str]] = {}  # picture -> its captions, in the order of the file
        for line in lines:
            self._references.setdefault(line.image, []).extend(line.captions)
        self._check_presence(lines, split)
        if training:
            self._records = [(line.image, caption) for line in lines for caption in line.captions]
        else:
            self._records = [(image, captions[0]) for image, captions in self._references.items()]

    def _warn_of_overlap(self, named: dict[str, list[str]], split: str) -> None:
        for other in SPLITS:
            first, second = sorted((split, other), key=SPLITS.index)
            both = [image for image, splits in named.items() if first in splits and second in splits]
            if both and other != split:
                pictures = f"{len(both)} pictures are" if len(both) > 1 else "1 picture is"
                _warn(
                    f"{self._folder}: {pictures} in {first} and in {second}, for example {_short(both[0])}: "
                    f"scores of {second} will be too good"
                )

    def _check_presence(self, lines: list[Line], split: str) -> None:
        numbers = {line.image: line.number for line in reversed(lines)}  # picture -> number of its first line
        absent = [image for image in self._references if not os.path.isfile(self._folder / image)]
        if absent:
            names = [f"{_short(image)} (line {numbers[image]})" for image in absent[:3]]
            raise UserError(
                f"{len(absent)} of the {len(self._references)} pictures for {split} are not in {self._folder}: "
                f"{', '.join(names)}{', ...' if len(absent) > 3 else ''}\n"
                "copy them there or delete their lines"
            )

    def __len__(self) -> int:
        return len(self._records)

    def info(self, index: int) -> RecordInfo:
        image, _ = self._records[index]
        return RecordInfo(image, self._references[image])

    def __getitem__(self, index: int) -> Record:
        image, caption = self._records[index]
        picture = transforms.read(self._folder / image)
        return {"image": picture, "caption": caption, "references": self._references[image], "id": image}
