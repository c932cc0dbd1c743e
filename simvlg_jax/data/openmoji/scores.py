"""Prints the accuracy of each OpenMoji question beside two guesses that do not look at the picture.

    python -m simvlg_jax.data.openmoji.scores runs/questions/eval/test.json runs/questions/eval/novel.json

"others" scores each answer against those of all other pictures with the same question. "frequent" is the accuracy of
always giving the answer that is most frequent in training.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from simvlg_jax.utils.errors import UserError, run_verb

TRAIN = "data/openmoji_questions/source/train.json"


class Score(NamedTuple):
    """Accuracies of `count` answers, 0..1. `others` is 0 for a question of a single picture."""

    count: int
    accuracy: float
    others: float
    frequent: float


def frequent_answers(train: Iterable[dict]) -> dict[str, str]:
    """{question: its most frequent answer}, the first in the alphabet of equally frequent ones."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for row in train:
        counts[row["question"]][row["answer"]] += 1
    return {question: min(each, key=lambda answer: (-each[answer], answer)) for question, each in counts.items()}


def score(examples: Sequence[dict], frequent: dict[str, str]) -> dict[str, Score]:
    """Returns {question: score}, and the score of all questions as "all".

    Args:
      examples: each with question, references (one answer) and caption (what the model answered).
      frequent: what `frequent_answers` gives.
    """
    groups = defaultdict(list)
    for example in examples:
        groups[example["question"]].append((example["caption"], example["references"][0]))
    scores = {}
    for question, pairs in groups.items():
        answers = Counter(answer for _, answer in pairs)
        right = sum(said == answer for said, answer in pairs)
        elsewhere = sum(answers[said] for said, _ in pairs) - right
        scores[question] = Score(
            len(pairs),
            right / len(pairs),
            elsewhere / (len(pairs) * max(1, len(pairs) - 1)),
            answers[frequent.get(question, "")] / len(pairs),
        )
    total = sum(each.count for each in scores.values())
    means = [sum(each.count * each[i] for each in scores.values()) / total for i in (1, 2, 3)]
    return {**dict(sorted(scores.items())), "all": Score(total, *means)}


def _read(path: str) -> list | dict:
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}", 2) from error


def _examples(path: str) -> list[dict]:
    """The answered questions of a results file."""
    results = _read(path)
    examples = results.get("examples", []) if isinstance(results, dict) else []
    if not examples or not all(example.get("question") and example.get("references") for example in examples):
        raise UserError(f"{path} holds no scored answers: name what evaluate wrote for questions, eval/SPLIT.json", 2)
    return examples


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simvlg_jax.data.openmoji.scores",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", help="what evaluate wrote, runs/questions/eval/SPLIT.json")
    parser.add_argument("--train", default=TRAIN, help=f"list of the training questions (default: {TRAIN})")
    given = parser.parse_args()
    frequent = frequent_answers(_read(given.train))
    for path in given.results:
        print(f"{path}\n{'':32} {'count':>6} {'accuracy':>9} {'others':>9} {'frequent':>9}")
        for question, each in score(_examples(path), frequent).items():
            print(f"{question:32} {each.count:6} {each.accuracy:9.1%} {each.others:9.1%} {each.frequent:9.1%}")


if __name__ == "__main__":
    run_verb(main)
