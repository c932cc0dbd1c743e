"""Accuracies of answers: what the golden answers leave out, and what must hold for any answers."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simvlg_jax.evaluation.questions import score
from simvlg_jax.evaluation.scores.answers import ACCURACIES, exact_accuracy, normalize, vqa_accuracy
from simvlg_jax.evaluation.scores.control import derangement
from simvlg_jax.evaluation.written import Written

ANSWER = st.text(st.sampled_from("aAbn1,. '?-\n"), max_size=12)


@pytest.mark.parametrize(
    ("answer", "people", "expected"),
    [
        (" Playing Guitar\n", ["playing guitar"], 1.0),
        ("man", ["woman", "MAN"], 1.0),
        ("a man", ["man"], 0.0),  # no article is removed
        ("two", ["2"], 0.0),
        ("", ["man"], 0.0),
    ],
)
def test_exact_accuracy(answer, people, expected):
    assert exact_accuracy(answer, people) == expected


@pytest.mark.parametrize("same", range(11))
def test_vqa_accuracy_counts_the_other_people(same):
    """The official formula: of each person, whether three of the nine others agree with the answer, at most 1."""
    people = ["yes"] * same + [f"other {number}" for number in range(10 - same)]
    those, others = min(1, (same - 1) / 3) if same else 0, min(1, same / 3)
    assert vqa_accuracy("yes", people) == pytest.approx((same * those + (10 - same) * others) / 10)


@given(ANSWER, st.lists(ANSWER, min_size=1, max_size=10), st.randoms())
def test_accuracies_are_shares_and_know_no_order_of_people(answer, people, rng):
    for name, accuracy in ACCURACIES.items():
        value = accuracy(answer, people)
        assert 0 <= value <= 1
        if not name.startswith("gqa"):  # GQA has one answer, the first
            shuffled = random.Random(rng.random()).sample(people, len(people))
            assert accuracy(answer, shuffled) == pytest.approx(value)


@given(st.lists(st.sampled_from(["the", "two", "dont", "cat", "red", "none"]), min_size=1, max_size=5))
def test_a_normalised_answer_stays_as_it_is(words):
    once = normalize(" ".join(words))
    assert normalize(once) == once


def test_control_gives_each_answer_the_people_of_another_question():
    references = [["red"], ["blue"], ["red"], ["green"], ["blue"]]
    answers = ["red", "blue", "blue", "red", "blue"]
    examples = [
        {"index": n, "id": str(n), "references": people, "caption": answer, "loss": 0.5}
        for n, (people, answer) in enumerate(zip(references, answers, strict=True))
    ]
    result = score(Written(0.5, examples, ["5"]), {}, exact_accuracy, seed=3)
    assert (result.score, result.metrics["unreadable"], result.metrics["loss"]) == (0.6, 1, 0.5)
    others = derangement(5, 3)
    expected = np.mean([answers[n] == references[other][0] for n, other in enumerate(others)])
    assert result.metrics["accuracy_shuffled"] == expected
    details = result.details()
    assert [one["score"] for one in details["examples"]] == [1, 1, 0, 0, 1]
    low, high = details["interval"]
    assert 0 <= low <= 0.6 <= high <= 1
    alone = score(Written(0.5, examples[:1], []), {}, exact_accuracy, seed=3)
    assert alone.metrics["accuracy_shuffled"] == 0 and alone.details()["interval"] is None
