"""A user's own pictures: a folder with `captions.jsonl`, one JSON object a line.

    {"image": "cats/1.jpg", "caption": "a cat on a mat"}
    {"image": "cats/2.jpg", "caption": ["two cats", "cats asleep"], "split": "val"}

Pictures are named relative to the folder. Without "split", a hash of the name puts 5 % of the pictures each into val
and test. Hugging Face's imagefolder spelling (`metadata.jsonl` with "file_name" and "text") is read as well.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from simvlg_jax.errors import UserError

FILES = ("captions.jsonl", "metadata.jsonl")
HELD_OUT_PERCENT = 5  # of the pictures, in val and in test each
EXAMPLE = '{"image": "cats/1.jpg", "caption": "a cat on a mat"}'


class Line(NamedTuple):
    image: str
    captions: list[str]
    split: str


def split_of(image: str) -> str:
    """The split of a picture whose line names none; depends on its name only."""
    percent = int.from_bytes(hashlib.sha256(image.encode()).digest()[:8]) * 100 / 2**64
    if percent < HELD_OUT_PERCENT:
        return "val"
    return "test" if percent < 2 * HELD_OUT_PERCENT else "train"


def _parse(text: str, where: str) -> Line:
    """One line of the file; raises UserError that begins with `where`."""
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); a line looks like {EXAMPLE}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{where}: not a JSON object; a line looks like {EXAMPLE}")
    image = fields.get("image", fields.get("file_name"))
    captions = fields.get("caption", fields.get("text"))
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(image, str) or not image:
        raise UserError(f'{where}: no "image"; a line looks like {EXAMPLE}')
    strings = isinstance(captions, list) and all(isinstance(text, str) and text.strip() for text in captions)
    if not captions or not strings:
        raise UserError(f'{where}: "caption" must be a text or a list of texts, not empty')
    split = fields.get("split", None) or split_of(image)
    if split not in FolderSource.SPLITS:
        raise UserError(f'{where}: unknown split "{split}"; known are {", ".join(FolderSource.SPLITS)}')
    return Line(image, captions, split)


def _read(folder: Path) -> list[Line]:
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        what = "is no folder" if not folder.is_dir() else f"has no {FILES[0]}"
        raise UserError(f"{folder} {what}; data.path must name a folder with pictures and {FILES[0]}: {EXAMPLE}")
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        return [_parse(text, f"{path}, line {n}") for n, text in enumerate(lines, 1) if text.strip()]


class FolderSource:
    """Records of a folder; in train one for each caption, else one for each picture.

    Raises UserError for an absent or malformed file, for pictures that are not there and for an empty split.
    """

    SPLITS = ("train", "val", "test")

    def __init__(self, path: str, split: str):
        self._folder = Path(path)
        lines = [line for line in _read(self._folder) if line.split == split]
        absent = [line.image for line in lines if not (self._folder / line.image).is_file()]
        if absent:
            raise UserError(
                f"{len(absent)} of the {len(lines)} pictures for {split} are not in {path}: "
                f"{', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}\n"
                "put them there or take their lines out"
            )
        if not lines:
            raise UserError(f'no picture of {path} is in the split "{split}"; give some lines "split": "{split}"')
        each = split == "train"
        self._records = [
            (line.image, caption, line.captions)
            for line in lines
            for caption in (line.captions if each else line.captions[:1])
        ]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, caption, references = self._records[int(index)]
        return {
            "image": (self._folder / image).read_bytes(),
            "caption": caption,
            "references": references,
            "id": image,
        }
