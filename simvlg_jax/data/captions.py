"""Caption processing shared by data sets."""

import re

MAX_WORDS = 50


def blip_caption(text: str) -> str:
    """Caption as BLIP-2, LAVIS and SimVLG train on it (their processor "blip_caption").

    Lower case; each of . ! " ( ) * # : ; ~ becomes a space; runs of white space become one space; trailing newlines
    and outer spaces go; at most MAX_WORDS words stay.
    """
    text = re.sub(r"[.!\"()*#:;~]", " ", text.lower())
    text = re.sub(r"\s{2,}", " ", text)
    text = text.rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:MAX_WORDS])


def well_formed(text: str) -> str:
    """The text with surrogate pairs joined and each lone surrogate, half a character, replaced by U+FFFD.

    JSON may hold such halves ("\\ud83d", an emoji that was cut in two); neither tokenizers nor UTF-8 take them.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
