"""The files that official evaluations read: COCO's results of captions, and the answers for VQA and GQA.

They name every record, since the official evaluations want all: `Written.texts` has an empty text for a record whose
picture cannot be read.
"""

import re
from collections.abc import Callable, Sequence

SUFFIXES = (".coco.json", ".vqa.json", ".gqa.json")  # behind eval/NAME
# The number of a picture in COCO's file names, and in the ids of LAVIS.
COCO_NAME = re.compile(r"(?:.*/)?(?:COCO_\w+?_0*|coco_)(\d+)(?:\.jpg)?")


def _number(name: str) -> int | None:
    """The number that an id is written as, None if it is another id ("007" is one)."""
    return int(name) if name.isdecimal() and str(int(name)) == name else None


def image_id(name: str) -> int | str:
    """Returns the id of a picture in COCO's sense: a number, if the record's id is one or holds COCO's.

    "val2014/COCO_val2014_000000184613.jpg" and "coco_184613" become 184613.
    """
    found = COCO_NAME.fullmatch(name)
    number = int(found[1]) if found else _number(name)
    return name if number is None else number


Texts = Sequence[tuple[str, str]]  # id and text of each record
Files = dict[str, list[dict]]  # suffix -> content


def coco(texts: Texts) -> Files:
    """Returns COCO's result file."""
    return {".coco.json": [{"image_id": image_id(name), "caption": text} for name, text in texts]}


def vqa(texts: Texts) -> Files:
    """Returns VQA's file; {} unless every question has a number, as VQA's have."""
    answers = [{"question_id": _number(name), "answer": text} for name, text in texts]
    return {} if any(answer["question_id"] is None for answer in answers) else {".vqa.json": answers}


def gqa(texts: Texts) -> Files:
    """Returns GQA's file."""
    return {".gqa.json": [{"questionId": name, "prediction": text} for name, text in texts]}


def no_file(texts: Texts) -> Files:
    """Returns {}: the data set has no official format."""
    del texts
    return {}


# Accuracy of `answers.ACCURACIES` -> the file of its data set.
OF_METRIC: dict[str, Callable[[Texts], Files]] = {"vqa": vqa, "gqa": gqa, "gqa_published": gqa, "exact": no_file}
