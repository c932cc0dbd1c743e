"""Finds the picture, the texts and the id in a row with named columns."""

import posixpath
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from simvlg_jax.data.extras import NONE, Extras
from simvlg_jax.data.pictures import VIDEO_SUFFIXES
from simvlg_jax.data.readers import texts
from simvlg_jax.data.skips import Fault

IMAGE = (
    *("image", "image_path", "file_name", "filename", "filepath", "file", "path"),
    *("img", "img_path", "image_file", "image_name", "jpg", "jpeg", "png", "webp"),
)
VIDEO = ("video", "video_path", "video_file", "mp4")
CAPTION = ("caption", "captions", "text", "texts", "txt", "sentence", "sentences", "description", "comment")
QUESTION = ("question",)
ANSWER = ("answer", "answers", "direct_answers")
IMAGE_ID, QUESTION_ID = ("image_id", "img_id", "video_id", "id"), ("question_id", "id")
SPLIT = ("split",)
GROUP = ("group", "domain")  # NoCaps: domain
REVERSE = ("reverse_caption",)
CHOICES, CORRECT = ("choices",), ("correct_choice_idx", "correct")  # A-OKVQA: correct_choice_idx
ADDRESS = ("url", "image_url", "coco_url", "flickr_url", "contenturl")
# Other names of splits: of Hugging Face, and of COCO-Karpathy.
SPLITS = {"validation": "val", "valid": "val", "dev": "val", "restval": "train"}


class Fields(NamedTuple):
    """What a row says.

    Attributes:
      media: "image" or "video".
      source: path or encoded bytes.
      faults: why some of its texts are left out.
      split: None if the row names none.
      extras: what evaluations use besides.
    """

    media: str
    source: str | bytes
    texts: list[str]
    faults: list[str]
    question: str | None
    id: str | None
    split: str | None
    extras: Extras = NONE


def find(columns: Iterable[str], names: tuple[str, ...]) -> str | None:
    """Returns the first of the names that is a column, in lower case."""
    columns = set(columns)
    return next((name for name in names if name in columns), None)


def canonical(split: str) -> str:
    return SPLITS.get(split, split)


def _value(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None and row[name] != ""), None)


def identifier(value: Any) -> str | None:
    """Returns an id as text, None if it is no id."""
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        return None
    text = str(value)
    return text if len(text) <= 1000 and "\0" not in text and text.isprintable() else None


def split_of(row: Mapping[str, Any]) -> str | None:
    split = _value(row, SPLIT)
    return canonical(split) if isinstance(split, str) else None


def parse(row: Mapping[str, Any], unlabelled: bool = False) -> Fields:
    """Reads a row whose columns are in lower case. Raises Fault if it has no picture or no good text.

    Args:
      unlabelled: a row may have no text at all.
    """
    video, picture = _value(row, VIDEO), _value(row, IMAGE)
    source = picture if video is None else video
    if source is None:
        raise Fault("an address, not a file" if _value(row, ADDRESS) is not None else "no picture")
    if isinstance(source, dict):  # of Hugging Face
        source = source.get("bytes") or source.get("path")
    if not isinstance(source, str | bytes) or not source:
        raise Fault("wrong type" if source else "no picture")
    question = _value(row, QUESTION)
    if question is not None and not isinstance(question, str):
        raise Fault("wrong type")
    name = "caption" if question is None else "answer"
    extras = _extras(row)
    value = _value(row, CAPTION if question is None else ANSWER)
    if extras.correct is not None and not isinstance(value, str | list | tuple | dict):
        value = extras.choices[extras.correct]
    elif extras.choices and _whole(value) is not None:
        value = None  # the place of a hidden answer
    good, faults = [], []
    if not unlabelled or value not in (None, []):
        good, faults = texts.sift(texts.as_list(value, name), name)
        if not good:
            raise Fault(faults[0])
    if question is not None:
        question = texts.checked(question, "question")
    is_video = video is not None or (isinstance(source, str) and _suffix(source) in VIDEO_SUFFIXES)
    own_id = identifier(_value(row, IMAGE_ID if question is None else QUESTION_ID))
    return Fields("video" if is_video else "image", source, good, faults, question, own_id, split_of(row), extras)


def beside(content: Mapping[str, Any]) -> Extras:
    """What a JSON file beside a picture or video says: its group, and the caption of the reverse. Raises Fault.

    Other names of these are not taken, since downloaders keep any columns of their lists there.
    """
    return _extras({name: content[name] for name in ("group", "reverse_caption") if name in content})


def _extras(row: Mapping[str, Any]) -> Extras:
    """The right choice may be a number, which is its place. Raises Fault for texts that cannot be used."""
    group, found, reverse = identifier(_value(row, GROUP)), _value(row, CHOICES), _value(row, REVERSE)
    if reverse is not None:
        if not isinstance(reverse, str):
            raise Fault("wrong type")
        reverse = texts.checked(reverse, "reverse_caption")
    if found is None or found == []:
        return Extras(group, reverse_caption=reverse)
    choices = tuple(texts.checked(text, "choice") for text in texts.as_list(found, "choice"))
    places = (row.get(name) for name in (*CORRECT, *ANSWER))
    correct = next((place for place in map(_whole, places) if place is not None), None)
    if correct is not None and correct < 0:  # how hidden answers of test splits are marked
        correct = None
    if correct is not None and correct >= len(choices):
        raise Fault("no such choice")
    return Extras(group, choices, correct, reverse)


def _whole(value: Any) -> int | None:
    """A whole number, also one that a table without nulls in its integers keeps as 1.0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or value % 1:
        return None
    return int(value)


def _suffix(path: str) -> str:
    return posixpath.splitext(path)[1].lower()
