"""Cleaning of captions, shared by all sources."""

import re

MAX_WORDS = 50


def blip_caption(text: str) -> str:
    """Cleans as the processor "blip_caption" of BLIP-2, LAVIS and SimVLG does for training.

    The text becomes lower case, and each of . ! " ( ) * # : ; ~ a space. Runs of white space shrink to one space,
    trailing newlines and outer spaces are stripped, and words after the first MAX_WORDS are dropped.
    """
    text = re.sub(r"[.!\"()*#:;~]", " ", text.lower())
    text = re.sub(r"\s{2,}", " ", text)
    text = text.rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:MAX_WORDS])


# Choices of `data.clean`; str leaves a caption as it is.
CLEANERS = {"": str, "blip_caption": blip_caption}


def well_formed(text: str) -> str:
    """Joins surrogate pairs, and replaces each lone surrogate (half a character) by U+FFFD.

    JSON may contain lone surrogates ("\\ud83d", an emoji that was cut in two), which neither tokenizers nor UTF-8
    accept.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
