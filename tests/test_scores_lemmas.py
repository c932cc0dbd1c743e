"""Answers by their base forms: with a stand-in for spaCy, which has its names."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from simvlg_jax.config import defaults
from simvlg_jax.evaluation.evaluators import make_evaluator
from simvlg_jax.evaluation.questions import lemmatised, score
from simvlg_jax.evaluation.scores.answers import exact_accuracy
from simvlg_jax.evaluation.scores.lemmas import lemmatise, load_nlp
from simvlg_jax.evaluation.written import Written
from simvlg_jax.utils.errors import UserError

WORDS = {
    "cats": ("NOUN", "cat"),
    "running": ("VERB", "run"),
    "better": ("ADJ", "good"),
    "is": ("AUX", "be"),
    "dogs": ("PROPN", "dog"),
}


def nlp(text: str) -> list[SimpleNamespace]:
    tokens = [(word, *WORDS.get(word, ("DET", word.lower()))) for word in text.split()]
    return [SimpleNamespace(text=word, pos_=kind, lemma_=lemma) for word, kind, lemma in tokens]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("cats", "cat"),
        ("the cats  running", "the cat run"),
        ("The dogs is better", "The dogs is better"),  # neither a noun nor a verb
        ("", ""),
    ],
)
def test_only_nouns_and_verbs_change(answer, expected):
    assert lemmatise(answer, nlp) == expected


def test_base_forms_are_scored_and_submitted():
    examples = [
        {"index": n, "id": str(n), "references": references, "caption": caption, "loss": None}
        for n, (caption, references) in enumerate([("cats", ["cat"]), ("better", ["good"])])
    ]
    written = lemmatised(Written(1.0, examples, ["9"]), nlp)
    assert written.texts() == [("0", "cat"), ("1", "better"), ("9", "")]
    details = score(written, {}, exact_accuracy, 0).details()
    assert [(one["written"], one["caption"], one["score"]) for one in details["examples"]] == [
        ("cats", "cat", 1.0),
        ("better", "better", 0.0),
    ]


def test_spacy_or_its_model_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)  # its import fails
    with pytest.raises(UserError, match=r"evals.val.lemmatise needs spaCy: pip install 'simvlg_jax\[lemmas\]'"):
        load_nlp("evals.val.lemmatise")
    spacy = ModuleType("spacy")
    monkeypatch.setitem(sys.modules, "spacy", spacy)

    def absent(name):
        raise OSError(f"[E050] Can't find model '{name}'.")

    spacy.load = absent
    with pytest.raises(UserError, match="needs the model en_core_web_sm of spaCy: python -m spacy download"):
        load_nlp("evals.val.lemmatise")
    spacy.load = lambda name: {"en_core_web_sm": nlp}[name]
    assert load_nlp("evals.val.lemmatise") is nlp


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        (
            "captioning",
            {"lemmatise": True},
            "evals.val.lemmatise is for the type questions, and the type is captioning",
        ),
        ("questions", {"extra_scores": "meteor"}, "evals.val.extra_scores is for the type captioning"),
        ("questions", {"choices": "yes|no"}, "evals.val.choices is for the type choices"),
        ("captioning", {"ranking": "mean"}, "evals.val.ranking is for the type choices"),
    ],
)
def test_keys_of_another_type_are_refused(kind, keys, message):
    entry = defaults.get_eval()
    entry.update(type="" if kind == "captioning" else kind, **keys)
    with pytest.raises(UserError, match=message) as raised:
        make_evaluator("val", entry, SimpleNamespace(evaluator="captioning"), None, None)
    assert raised.value.status == 2
