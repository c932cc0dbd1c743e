"""Checks captions, questions and answers."""

import json
from typing import Any

from simvlg_jax.data.captions import well_formed
from simvlg_jax.data.skips import Fault

MAX_CHARACTERS = 10_000
MAX_BYTES = 2**24  # of a file with a caption or its JSON
INNER = ("raw", "caption", "text", "answer")  # of a text that is an object


def decode(data: bytes) -> str:
    """Raises Fault if the bytes are not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Fault("caption not UTF-8") from None


def parse_json(data: bytes) -> Any:
    """Raises Fault if the bytes are not JSON in UTF-8."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise Fault("not JSON") from None


def first_line(text: str) -> str:
    """The first line that is not empty, without outer white space; "" if there is none."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def checked(text: str, name: str = "caption") -> str:
    """Returns a text with its half characters repaired. Raises Fault if it is empty, too long or malformed.

    Args:
      name: what the text is: "caption", "question" or "answer".
    """
    if not text.strip():
        raise Fault(f"{name} empty")
    if len(text) > MAX_CHARACTERS:
        raise Fault(f"{name} too long")
    if "\0" in text:
        raise Fault(f"{name} with NUL")
    return well_formed(text)


def as_list(value: Any, name: str = "caption") -> list[str]:
    """A text, a list of texts, or a list of objects with a text. Raises Fault if it is anything else."""
    values = [value] if isinstance(value, str | dict) else value
    if not isinstance(values, list | tuple):
        raise Fault(f"no {name}" if value is None else "wrong type")
    texts = [_inner(value) for value in values]
    if not all(isinstance(text, str) for text in texts):
        raise Fault("wrong type")
    if not texts:
        raise Fault(f"no {name}")
    return texts


def _inner(value: Any) -> Any:
    return next((value[name] for name in INNER if name in value), None) if isinstance(value, dict) else value


def sift(texts: list[str], name: str = "caption") -> tuple[list[str], list[str]]:
    """Returns the good texts, and the faults of the others."""
    good, faults = [], []
    for text in texts:
        try:
            good.append(checked(text, name))
        except Fault as fault:
            faults.append(str(fault))
    return good, faults
