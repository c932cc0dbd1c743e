"""A user's own pictures: a folder with `captions.jsonl`, one JSON object a line.

    {"image": "cats/1.jpg", "caption": "a cat on a mat"}
    {"image": "cats/2.jpg", "caption": ["two cats", "cats asleep"], "split": "val"}

Pictures are named relative to the folder. Several lines may name one picture: all their captions belong to it. Without
"split", a line is in the split that another line of the picture names; if none does, a hash of the name puts 5 % of
the pictures each into val and test. Hugging Face's imagefolder spelling (`metadata.jsonl` with "file_name" and "text")
is read as well.
"""

import functools
import hashlib
import json
import os
import posixpath
from pathlib import Path
from typing import Any, NamedTuple

from simvlg_jax.data import transforms
from simvlg_jax.data.captions import well_formed
from simvlg_jax.utils.errors import UserError, warn

FILES = ("captions.jsonl", "metadata.jsonl")
HELD_OUT_PERCENT = 5  # of the pictures, in val and in test each
EXAMPLE = '{"image": "cats/1.jpg", "caption": "a cat on a mat"}'


class Line(NamedTuple):
    number: int
    image: str  # "a.png" for "./a.png" too
    captions: list[str]
    repaired: int  # captions that held half a character
    split: str | None


def split_of(image: str) -> str:
    """The split of a picture whose lines name none; depends on its name only."""
    percent = int.from_bytes(hashlib.sha256(image.encode()).digest()[:8]) * 100 / 2**64
    if percent < HELD_OUT_PERCENT:
        return "val"
    return "test" if percent < 2 * HELD_OUT_PERCENT else "train"


def _short(name: str) -> str:
    """A name for a message."""
    return well_formed(name if len(name) <= 100 else f"{name[:100]}...")


def _parse(text: str, number: int, file: Path, allow_outside: bool) -> Line:
    """One line of the file; raises UserError that names file and line."""
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
            f'{where}: "{_short(image)}" is outside of the folder or an absolute name; put the picture into '
            f"{file.parent} and name it relative to that, or set data.allow_outside=True"
        )
    strings = isinstance(captions, list) and all(isinstance(text, str) and text.strip() for text in captions)
    if not captions or not strings:
        raise UserError(f'{where}: "caption" must be a text or a list of texts, not empty')
    split = fields.get("split") or None
    if split not in (None, *FolderSource.SPLITS):
        name = f' "{_short(split)}"' if isinstance(split, str) else ""
        raise UserError(f"{where}: unknown split{name}; known are {', '.join(FolderSource.SPLITS)}")
    repaired = [well_formed(caption) for caption in captions]
    return Line(number, image, repaired, sum(map(str.__ne__, captions, repaired)), split)


def _read(folder: Path, allow_outside: bool) -> list[Line]:
    path = next((folder / name for name in FILES if os.path.isfile(folder / name)), None)
    if path is None:
        what = "is no folder" if not os.path.isdir(folder) else f"has no {FILES[0]}"
        raise UserError(f"{folder} {what}; data.path must name a folder with pictures and {FILES[0]}: {EXAMPLE}")
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as lines:
            return [_parse(text, n, path, allow_outside) for n, text in enumerate(lines, 1) if text.strip()]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


_warn = functools.cache(warn)  # once in a process: evaluating may open a split again and again


class FolderSource:
    """Records of a folder; in training one for each caption, else one for each picture with its first caption.

    The references of a record are all captions that the split's lines give its picture, in the file's order. The id is
    the picture's name. Its file is found by that name alone: a symbolic link inside of the folder is followed wherever
    it leads.

    Raises UserError for an absent or malformed file, for pictures that are not there and for an empty split. Warns on
    stderr of a picture that is in two splits and of half characters (lone surrogates) in captions.
    """

    SPLITS = ("train", "val", "test")

    def __init__(self, path: str, split: str, *, training: bool = False, allow_outside: bool = False):
        """Args:
        path: the folder.
        split: one of SPLITS.
        training: a record for each caption instead of for each picture.
        allow_outside: pictures may lie outside of the folder, as "../a.png" or "/pictures/a.png".
        """
        self._folder = Path(path)
        lines = _read(self._folder, allow_outside)
        named: dict[str, list[str]] = {}  # picture -> splits that its lines name
        for line in lines:
            if line.split:
                named.setdefault(line.image, []).append(line.split)
        self._warn_of_overlap(named, split)

        lines = [line for line in lines if (line.split or named.get(line.image, [split_of(line.image)])[0]) == split]
        if not lines:
            raise UserError(f'no picture of {path} is in the split "{split}"; give some lines "split": "{split}"')
        if repaired := sum(line.repaired for line in lines):
            _warn(
                f"{path}: {repaired} of the captions for {split} hold half a character (a lone surrogate): now \ufffd"
            )
        self._references: dict[str, list[str]] = {}
        for line in lines:
            self._references.setdefault(line.image, []).extend(line.captions)
        self._check_presence(lines, split)
        if training:
            self._records = [(line.image, caption) for line in lines for caption in line.captions]
        else:
            self._records = [(image, captions[0]) for image, captions in self._references.items()]

    def _warn_of_overlap(self, named: dict[str, list[str]], split: str) -> None:
        for other in self.SPLITS:
            first, second = sorted((split, other), key=self.SPLITS.index)
            both = [image for image, splits in named.items() if first in splits and second in splits]
            if both and other != split:
                pictures = f"{len(both)} pictures are" if len(both) > 1 else "1 picture is"
                _warn(
                    f"{self._folder}: {pictures} in {first} and in {second}, for example {_short(both[0])}: "
                    f"scores of {second} will be too good"
                )

    def _check_presence(self, lines: list[Line], split: str) -> None:
        numbers = {line.image: line.number for line in reversed(lines)}  # the first line of each picture
        absent = [image for image in self._references if not os.path.isfile(self._folder / image)]
        if absent:
            names = [f"{_short(image)} (line {numbers[image]})" for image in absent[:3]]
            raise UserError(
                f"{len(absent)} of the {len(self._references)} pictures for {split} are not in {self._folder}: "
                f"{', '.join(names)}{', ...' if len(absent) > 3 else ''}\n"
                "put them there or take their lines out"
            )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, caption = self._records[int(index)]
        return {
            "image": transforms.read(self._folder / image),
            "caption": caption,
            "references": self._references[image],
            "id": image,
        }
