"""Scores of groups are those of their records alone, and the evaluations of captions and answers have them."""

import json
from pathlib import Path

import pytest

from simvlg_jax.data.extras import Extras
from simvlg_jax.data.sources import RecordInfo
from simvlg_jax.evaluation import captioning, choices, questions
from simvlg_jax.evaluation.batches import Found, described
from simvlg_jax.evaluation.groups import MOST, by_group
from simvlg_jax.evaluation.scores.answers import exact_accuracy
from simvlg_jax.evaluation.scores.captions import score_captions
from simvlg_jax.evaluation.scores.java import JavaScore
from simvlg_jax.evaluation.written import Written

GOLDEN = json.loads((Path(__file__).parent / "golden" / "caption_metrics.json").read_text())
DOMAINS = ("in-domain", "near-domain", "out-domain")


def example(n: int, group: str | None, references: list[str], caption: str) -> dict:
    info = RecordInfo(str(n), references, extras=Extras(group))
    return described(n, info) | {"caption": caption, "loss": None}


def test_an_example_says_what_its_record_has():
    info = RecordInfo("7", ["yes"], "is it?", Extras("near"), "Question: is it?")
    assert described(3, info) == {"index": 3, "id": "7", "references": ["yes"], "question": "is it?", "group": "near"}
    assert described(0, RecordInfo("a", [])) == {"index": 0, "id": "a", "references": []}


def test_captions_of_a_domain_are_scored_alone():
    """So the document frequencies of CIDEr are those of the domain."""
    count = 30
    examples = [example(n, DOMAINS[n % 3], GOLDEN["references"][n], GOLDEN["hypotheses"][n]) for n in range(count)] + [
        example(count, None, GOLDEN["references"][count], GOLDEN["hypotheses"][count])
    ]
    extra = JavaScore("METEOR", lambda *_: None, lambda references, _: len(references) / 100)
    details = captioning.score(Written(1.0, examples, []), {}, 0, [extra]).details()
    assert list(details["groups"]) == list(DOMAINS)
    for place, domain in enumerate(DOMAINS):
        numbers = range(place, count, 3)
        alone = score_captions(
            {str(n): GOLDEN["references"][n] for n in numbers}, {str(n): GOLDEN["hypotheses"][n] for n in numbers}
        )
        assert details["groups"][domain] == {**alone.as_dict(), "METEOR": 0.1, "num_examples": 10}
    assert details["scores"]["METEOR"] == 0.31 and details["num_examples"] == 31


def test_answers_and_choices_by_group():
    examples = [
        example(0, "a", ["yes"], "yes"),
        example(1, "b", ["no"], "yes"),
        example(2, "b", ["no"], "no"),
        example(3, "b", [], "no"),  # cannot be scored
    ]
    details = questions.score(Written(1.0, examples, []), {}, exact_accuracy, 0).details()
    expected = {"a": {"accuracy": 1.0, "num_examples": 1}, "b": {"accuracy": 0.5, "num_examples": 2}}
    assert details["groups"] == expected and details["unlabelled"] == 1
    chosen = [
        one | {"score": None if right is None else float(right), "chance": 0.25}
        for one, right in zip(examples, (1, 0, 1, None), strict=True)
    ]
    found = Found([{"shuffled": [0.0, 1.0]}], chosen, [])
    details = choices.score(found, Written(None, chosen, []), {}, 0).details()
    assert details["groups"] == {name: {**scores, "chance": 0.25} for name, scores in expected.items()}
    assert details["shuffled"] == {"accuracy": 0.5}


def test_results_without_groups_do_not_mention_them(capsys):
    examples = [example(n, None, ["yes"], "yes") for n in range(2)]
    assert "groups" not in questions.score(Written(1.0, examples, []), {}, exact_accuracy, 0).details()
    many = [example(n, f"host {n}", ["yes"], "yes") for n in range(MOST + 1)]
    assert by_group(many, lambda some: pytest.fail("scored")) == {}
    assert "65 groups, more than 64" in capsys.readouterr().err
    assert len(by_group(many[1:], lambda some: {})["groups"]) == MOST
