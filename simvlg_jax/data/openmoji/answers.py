"""Questions about an emoji and their answers, which follow from its code points and its English name.

Only what the picture shows is asked. So the skin tone is asked where there is exactly one, and the gender is not asked
of small figures, whose man and woman differ by a few pixels.
"""

import re
from collections.abc import Sequence

from simvlg_jax.data.openmoji.names import is_flag

# Kind of the question -> its words.
QUESTIONS = {
    "kind": "What kind of thing is it?",
    "tone": "What is the skin tone?",
    "gender": "Is it a man or a woman?",
    "hair": "What is the hair like?",
    "number": "How many people are there?",
    "facing": "Which way does the person face?",
    "action": "What is the person doing?",
    "job": "What is the person's job?",
}

# Groups of Unicode's emoji list, as ranges of the first code point. Left out are parts, and things of two groups, such
# as paw prints and cat faces.
KINDS = {
    "animal": "1F400-1F419 1F41B-1F43C 1F54A 1F577 1F980-1F99F 1F9A1-1F9A9 1F9AB-1F9AE 1FAB0-1FAB3 1FABC 1FABF "
    "1FACE-1FACF",
    "food": "1F32D-1F330 1F336 1F33D 1F345-1F36E 1F370-1F373 1F37F 1F382 1F950-1F95A 1F95C-1F961 1F963 1F965-1F96F "
    "1F9C0-1F9C1 1F9C4-1F9C8 1FAD0-1FAD5 1FAD8 1FADA-1FADC",
    "smiley": "1F600-1F637 1F641-1F644 1F910-1F915 1F917 1F920-1F925 1F927-1F92F 1F970-1F976 1F978-1F97A "
    "1FAE0-1FAE6 1FAE8-1FAE9",
    "vehicle": "1F3CD-1F3CE 1F680-1F688 1F68A-1F68E 1F690-1F69E 1F6A4 1F6B2 1F6E5 1F6E9 1F6F3-1F6F6 1F6F9-1F6FB "
    "26F4-26F5 2708",
    "clothing": "1F3A9 1F392-1F393 1F451-1F462 1F97B-1F97F 1F9E2-1F9E6 1FA70-1FA74",
}
# What whole figures do, and what half figures do.
SPORTS = (
    *("walking", "running", "kneeling", "standing", "climbing", "golfing", "surfing", "swimming", "biking", "juggling"),
    *("cartwheeling", "dancing", "rowing boat", "bouncing ball", "lifting weights", "playing handball"),
    "playing water polo",
)
GESTURES = ("getting haircut", "getting massage", "raising hand", "shrugging", "facepalming", "bowing")
JOBS = (
    *("farmer", "cook", "student", "singer", "teacher", "mechanic", "scientist", "artist", "pilot", "astronaut"),
    *("firefighter", "judge", "detective", "guard", "technologist", "police officer", "construction worker"),
    *("factory worker", "office worker", "health worker"),
)
MIRRORED = ("walking", "running", "kneeling", "in manual wheelchair", "in motorized wheelchair", "with white cane")
# Whole figures, and women with a beard: their gender is not asked.
UNCLEAR_GENDER = {*SPORTS, *MIRRORED, "mountain biking", "in lotus position", "with a beard"}

_NUMBERS = ("zero", "one", "two", "three", "four")
_NAME = re.compile(r"(?P<bare>.+?)(?P<right> facing right)?(?:, (?P<tones>[-a-z ]+) skin tones?)?")
_PERSON = re.compile(r"(?:(?P<who>man|woman|person)(?: |$))?(?P<what>.*)")
_PAIR = re.compile(r"(?:men|women|people|woman and man) (?:holding hands|with bunny ears|wrestling)")
_MEMBERS = re.compile(r"(?:family of|kiss,|couple with heart,) (.+)")
_HAIR = re.compile(r"with (red|curly|white|blond) hair")


def ask(codes: Sequence[str], name: str) -> dict[str, str]:
    """Returns {kind of the question: answer} of all questions that the picture of an emoji answers.

    Args:
      codes: upper-case hex code points of the whole sequence.
      name: its caption, see `names.caption`.
    """
    bare, right, tones = _NAME.fullmatch(name).groups()
    who, what = _PERSON.fullmatch(bare).groups()
    people, hair = _people(bare, who, what), _HAIR.fullmatch(what)
    answers = {
        "kind": _kind(codes),
        "tone": tones if tones and " and " not in tones else None,
        "gender": who if who != "person" and people == 1 and what not in UNCLEAR_GENDER else None,
        "hair": "bald" if bare.startswith("bald ") else hair and hair[1],
        "number": _NUMBERS[people] if people and what != "feeding baby" else None,
        "facing": ("right" if right else "left") if what in MIRRORED else None,
        "action": what if what in (*SPORTS, *GESTURES) else None,
        "job": what if what in JOBS else None,
    }
    return {kind: answer for kind, answer in answers.items() if answer}


def _kind(codes: Sequence[str]) -> str | None:
    if is_flag(list(codes)):
        return "flag"
    first = int(codes[0], 16)
    return next((kind for kind, ranges in KINDS.items() if _within(first, ranges)), None)


def _within(code: int, ranges: str) -> bool:
    """Whether a code point is in ranges such as "1F400-1F43D 1F54A"."""
    bounds = [[int(end, 16) for end in each.split("-")] for each in ranges.split()]
    return any(bound[0] <= code <= bound[-1] for bound in bounds)


def _people(bare: str, who: str | None, what: str) -> int:
    """Number of people in the picture, 0 if the name does not say it."""
    if members := _MEMBERS.fullmatch(bare):
        words = re.findall(r"\w+", members[1].replace(" and ", " "))
        numbers = {word: number for number, word in enumerate(_NUMBERS)}
        # "two boys" are two: the noun counts as one, and its number adds the others.
        return sum(numbers[word] - 1 if word in numbers else 1 for word in words)
    if _PAIR.fullmatch(bare):
        return 2
    return 1 if who or what in JOBS else 0
