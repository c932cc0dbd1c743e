"""Scores short answers to questions: the accuracy of VQAv2 and OK-VQA, GQA's, and exact matches.

The normalisation and the accuracy are those of VQA's official evaluation (https://visualqa.org/evaluation.html), with
its oddities, so that numbers compare.

Scale: fractions. "Accuracy 48.4" in papers is 0.484 here.
"""

import re
from collections.abc import Callable, Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = {"a", "an", "the"}
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
PERIODS = 32  # the official code passes a flag of this value in the place of the greatest number of replacements

# The official table restores a missing apostrophe. Its entries with a capital letter never apply and are left out.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {lacking: word for word in _CONTRACTED.split() for lacking in _without_one_apostrophe(word)}
CONTRACTIONS["somebody'd"] = "somebodyd"  # official: this one loses its apostrophe


def without_punctuation(text: str) -> str:
    """Removes punctuation next to a space, replaces other punctuation by a space, and removes periods.

    A comma between digits anywhere in the text has all punctuation removed. A period before a digit stays.
    """
    number = re.search(r"\d,\d", text)
    result = text
    for sign in PUNCTUATION:
        removed = number or f"{sign} " in text or f" {sign}" in text
        result = result.replace(sign, "" if removed else " ")
    return re.sub(r"\.(?!\d)", "", result, count=PERIODS)


def normalize(answer: str) -> str:
    """Returns a model's answer as VQA compares it: lower case, digits for numbers, no punctuation and no articles."""
    text = without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip())
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """Returns the mean over the people of min(1, n / 3), where n others gave the model's answer.

    People's answers lose their punctuation only if they are not all equal.

    Args:
      answer: of the model.
      people: each person's answer, officially ten; equal ones repeated.
    """
    answer = normalize(answer)
    differ = len(set(people)) > 1
    people = [without_punctuation(each) if differ else each for each in people]
    same = people.count(answer)
    return sum(min(1.0, (same - (each == answer)) / 3) for each in people) / len(people)


def gqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """Returns 1 if the normalised answer is the first of the answers, normalised too, else 0."""
    return float(normalize(answer) == normalize(people[0]))


def gqa_published_accuracy(answer: str, people: Sequence[str]) -> float:
    """Returns `gqa_accuracy` as the published code has it: the first of the answers is compared as it is written."""
    return float(normalize(answer) == people[0])


def exact_accuracy(answer: str, people: Sequence[str]) -> float:
    """Returns 1 if any of the answers is the model's, without regard to case and outer spaces; MSR-VTT-QA, MSVD-QA."""
    return float(answer.strip().lower() in {each.strip().lower() for each in people})


Accuracy = Callable[[str, Sequence[str]], float]

ACCURACIES: dict[str, Accuracy] = {
    "vqa": vqa_accuracy,
    "gqa": gqa_accuracy,
    "gqa_published": gqa_published_accuracy,
    "exact": exact_accuracy,
}
