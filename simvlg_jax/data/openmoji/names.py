"""Turns names of the `emoji` package (":woman_juggling_dark_skin_tone:") into plain English captions."""

import re
import unicodedata
from collections import Counter

_TONE = re.compile(r" ?\b(light|medium-light|medium|medium-dark|dark) skin tone\b")
_PLURALS = {
    "man": "men",
    "woman": "women",
    "person": "people",
    "boy": "boys",
    "girl": "girls",
    "adult": "adults",
    "child": "children",
}
_PEOPLE = "|".join(_PLURALS)
_NUMBERS = {2: "two", 3: "three", 4: "four"}
# Names of states and regions that need "the" in English.
_ARTICLE = re.compile(
    r"^(United |Isle of Man|Bahamas|Comoros|Gambia|Maldives|Philippines|Seychelles)"
    r"|^(?!Heard|South Georgia).*(Islands|Republic|Territory|Territories|Lands|Netherlands|Union)$"
)
_COUNTRIES = {
    "Cocos (Keeling) Islands": "Cocos Islands",
    "Hong Kong SAR China": "Hong Kong",
    "Macao SAR China": "Macao",
    "Myanmar (Burma)": "Myanmar",
    "St. Helena Ascension & Tristan da Cunha": "Saint Helena, Ascension and Tristan da Cunha",
    "South Georgia & South Sandwich Islands": "South Georgia and the South Sandwich Islands",
    "St. Vincent & Grenadines": "Saint Vincent and the Grenadines",
    "Turkiye": "Turkey",
}
_IRREGULAR = {
    "keycap #": "keycap number sign",
    "keycap *": "keycap asterisk",
    "flag in hole": "flag in a golf hole",
    "UP! button": "UP button",
    "ON! arrow": "ON arrow",
    "Mrs. Claus": "Mrs Claus",
    "mount fuji": "Mount Fuji",
}


def is_flag(codes: list[str]) -> bool:
    """Whether the code points (upper-case hex) are the flag of a country or region; CLDR gives only its place."""
    return all("1F1E6" <= code <= "1F1FF" for code in codes) or "E007F" in codes


def _flag(place: str) -> str:
    place = _COUNTRIES.get(place, place).replace("&", "and").replace("St. ", "Saint ").replace("U.S.", "US")
    return f"flag of {'the ' if _ARTICLE.search(place) else ''}{place}"


def _list_people(words: list[str]) -> str:
    """["man", "boy", "boy"] -> "man and two boys"."""
    parts = [f"{_NUMBERS[n]} {_PLURALS[word]}" if n > 1 else word for word, n in Counter(words).items()]
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _natural(text: str) -> str:
    """Rewrites names that CLDR writes as lists in English word order; `text` has no skin tone."""
    if text in _IRREGULAR:
        return _IRREGULAR[text]
    if match := re.fullmatch(r"(A|B|AB|O) button \(blood type\)", text):
        return f"blood type {match[1]} button"
    if match := re.fullmatch(r"Japanese (.+) button", text):
        return f'Japanese "{match[1]}" button'
    if match := re.fullmatch(r"(man|woman|person) (\w+ hair)", text):
        return f"{match[1]} with {match[2]}"
    if match := re.fullmatch(r"(man|woman|person) (bald|beard)", text):
        return f"bald {match[1]}" if match[2] == "bald" else f"{match[1]} with a beard"
    if match := re.fullmatch(rf"(family|kiss|couple with heart)((?: (?:{_PEOPLE}))+)", text):
        joint = " of" if match[1] == "family" else ","
        return f"{match[1]}{joint} {_list_people(match[2].split())}"
    return text


def caption(name: str, codes: list[str]) -> str:
    """English caption of one emoji in plain ASCII.

    Args:
      name: English short name of the `emoji` package, including ":" and "_".
      codes: code points in upper-case hex, which distinguish flags from other emoji.
    """
    text = name.strip(":").replace("_", " ").replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    if is_flag(codes):
        return _flag(text)
    tones = list(dict.fromkeys(_TONE.findall(text)))
    bare = _TONE.sub("", text)
    if not tones or not bare:  # the five skin tones are emoji themselves
        return _natural(text)
    return f"{_natural(bare)}, {' and '.join(tones)} skin tone{'s' if len(tones) > 1 else ''}"
