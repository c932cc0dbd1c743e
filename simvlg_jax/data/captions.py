"""Cleaning of captions and questions, shared by all sources."""

import re
from collections.abc import Callable
from typing import NamedTuple

MAX_WORDS = 50
SIGNS = r"[.!\"()*#:;~]"


class CaptionError(ValueError):
    """A caption, question or answer that cannot be trained on."""


def blip_caption(text: str) -> str:
    """Cleans as the processor "blip_caption" of BLIP-2, LAVIS and SimVLG does for training.

    The text becomes lower case, and each of . ! " ( ) * # : ; ~ a space. Runs of white space shrink to one space,
    trailing newlines and outer spaces are stripped, and words after the first MAX_WORDS are dropped.
    """
    text = re.sub(SIGNS, " ", text.lower())
    text = re.sub(r"\s{2,}", " ", text)
    text = text.rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:MAX_WORDS])


def blip_question(text: str) -> str:
    """Cleans as the processor "blip_question" of BLIP-2, LAVIS and SimVLG does.

    The text becomes lower case, each of . ! " ( ) * # : ; ~ is deleted, trailing spaces are stripped, and words after
    the first MAX_WORDS are dropped. The question mark stays.
    """
    text = re.sub(SIGNS, "", text.lower()).rstrip(" ")
    return " ".join(text.split(" ")[:MAX_WORDS])


class Cleaner(NamedTuple):
    """How the captions and the questions of a source are cleaned. Answers are never cleaned, as published."""

    caption: Callable[[str], str]
    question: Callable[[str], str]


# Choices of `data.clean`; str leaves a text as it is.
CLEANERS = {"": Cleaner(str, str), "blip_caption": Cleaner(blip_caption, blip_question)}


def well_formed(text: str) -> str:
    """Joins surrogate pairs, and replaces each lone surrogate (half a character) by U+FFFD.

    JSON may contain lone surrogates ("\\ud83d", an emoji that was cut in two), which neither tokenizers nor UTF-8
    accept.
    """
    if text.isascii():
        return text  # itself, since millions of them are held
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
