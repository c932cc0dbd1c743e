"""Caption scores and their tokeniser give pycocoevalcap's numbers, and keep what must hold for any captions."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simvlg_jax.evaluation.scores.captions import score_captions, shuffled_control
from simvlg_jax.evaluation.scores.control import derangement
from simvlg_jax.evaluation.scores.ptb_tokenizer import tokenize

GOLDEN = json.loads((Path(__file__).parent / "golden" / "caption_metrics.json").read_text())
REFERENCES = {f"picture {i}": texts for i, texts in enumerate(GOLDEN["references"])}
HYPOTHESES = {f"picture {i}": text for i, text in enumerate(GOLDEN["hypotheses"])}

# Words without marks that a neighbouring caption could change the reading of.
WORDS = ("a", "dog", "cat's", "sat", "on", "the", "red/blue", "mat", "3", "don't")
captions = st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join)
# BLEU-4 needs four words: of shorter captions even the perfect one scores nearly 0.
sentences = st.lists(st.sampled_from(WORDS), min_size=4, max_size=8).map(" ".join)
corpora = st.lists(st.tuples(st.lists(captions, min_size=1, max_size=3), captions), min_size=2, max_size=6).map(
    lambda rows: ({str(i): r for i, (r, _) in enumerate(rows)}, {str(i): h for i, (_, h) in enumerate(rows)})
)


def test_tokens_equal_golden():
    assert tokenize(GOLDEN["hypotheses"]) == GOLDEN["tokenized_hypotheses"]
    for texts, tokens in zip(GOLDEN["references"], GOLDEN["tokenized_references"], strict=True):
        assert tokenize(texts) == tokens


# Seen from the published tokeniser (Stanford PTBTokenizer 3.4.1, as pycocoevalcap calls it).
@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("She shouldn't've; they'll, I'm, we'd", "she should n't 've they 'll i 'm we 'd"),
        ("cannot gonna gotta wanna lemme gimme 'tis 'twas", "can not gon na got ta wan na lem me gim me 't is 't was"),
        ("cannot's O'Brien's ma'am y'all c'mon o'clock", "cannot 's o'brien 's ma'am y' all c'mon o'clock"),
        ("the '90s, 1990's, rock 'n' roll, the boys' dogs'", "the '90s 1990 's rock 'n' roll the boys dogs"),
        ("\u201csmart\u201d \u2018quotes\u2019 it\u2019s don\u2019t \u2014 \u2013 \u2026", "smart quotes it 's do n't"),
        ("$5.50 US$5 £5 €10 50¢ #1 #tag 50% 5-6", "$ 5.50 us$ 5 # 5 $ 10 50 cents # 1 #tag 50 % 5-6"),
        ("1,000 1/2 cup, 1 1/2 cups, 3-1/2, ½, 90°F", "1,000 1/2 cup 1\u00a01/2 cups 3-1/2 1/2 90 ° f"),
        ("10:30am 10:30 a.m. 5pm 12/25/2010 6'2\"", "10:30 am 10:30 a.m. 5pm 12/25/2010 6 2"),
        (
            "Mr. Smith, Dr. and St. Louis etc. Co. Jan. approx. ft.",
            "mr. smith dr. and st. louis etc. co. jan. approx ft.",
        ),
        ("the U.S. flag, J.K. Rowling, a Ph.D. no. 7, no. Bus", "the u.s. flag j.k. rowling a ph.d. no. 7 no bus"),
        ("vitamin C. The dog. plan b. it", "vitamin c the dog plan b. it"),
        ("red/blue he/she/they his / her w/o", "red/blue he/she/they his / her w/o"),
        ("AT&T R&B salt&pepper a & b &amp; A+B", "at&t r&b salt & pepper a & b & a+b"),
        ("me@site.com www.site.com http://a.b/c?d=e. foo.jpg", "me@site.com www.site.com http://a.b/c?d=e foo.jpg"),
        ("(pizza) [pizza] {pizza} <b>", "-lrb- pizza -rrb- -lsb- pizza -rsb- -lcb- pizza -rcb- <b>"),
        ("half-eaten 3-year-old non-U.S. mother-in-law's x--y", "half-eaten 3-year-old non-u.s. mother-in-law 's x y"),
        ("hello!!! what?! hmm... ok. . . wow !", "hello !!! what ?! hmm ok wow"),
        (":) :-( <3 *star* a_b C++ ~", ":-rrb- :--lrb- < 3 * star * a_b c++ ~"),
        ("(555) 555-1212", "-lrb-555-rrb-\u00a0555-1212"),
        ("Café, naïve Zürich 日本 dog😀 ♥", "café naïve zürich 日本 dog ♥"),
        ("  tab\there\u00a0 and\nline ", "tab here and line"),
        ("", ""),
        ("...!", ""),
    ],
)
def test_tokens(caption, tokens):
    assert tokenize([caption]) == [tokens]


def test_tokens_look_across_lines_as_published():
    assert tokenize(["bus no.", "7 dogs", "plan B.", "The end"]) == ["bus no.", "7 dogs", "plan b", "the end"]
    assert tokenize(["bus no.", "dogs", "plan B.", "the end"]) == ["bus no", "dogs", "plan b.", "the end"]


def test_scores_equal_golden():
    scores = score_captions(REFERENCES, HYPOTHESES)
    expected = {name: value for name, value in GOLDEN["scores"].items() if name != "METEOR"}
    assert scores.as_dict() == pytest.approx(expected, abs=1e-6)
    assert list(scores.cider_per_example) == list(REFERENCES)
    np.testing.assert_allclose(list(scores.cider_per_example.values()), GOLDEN["cider_each"], atol=1e-6)


def test_scores_do_not_depend_on_the_order_of_keys():
    keys = list(HYPOTHESES)
    random.Random(0).shuffle(keys)
    shuffled = score_captions(REFERENCES, {key: HYPOTHESES[key] for key in keys})
    assert shuffled == score_captions(REFERENCES, HYPOTHESES)


@settings(deadline=None)
@given(corpora, st.randoms())
def test_scores_do_not_depend_on_the_order_of_pictures(corpus, rng):
    references, hypotheses = corpus
    keys = list(references)
    rng.shuffle(keys)
    scores = score_captions(references, hypotheses)
    moved = score_captions({k: references[k] for k in keys}, {k: hypotheses[k] for k in keys})
    assert moved.as_dict() == pytest.approx(scores.as_dict(), abs=1e-9)
    assert moved.cider_per_example == pytest.approx(scores.cider_per_example, abs=1e-9)


@settings(deadline=None)
@given(st.lists(st.tuples(sentences, captions), min_size=2, max_size=6))
def test_no_caption_beats_the_reference_itself(pairs):
    references = {str(i): [reference] for i, (reference, _) in enumerate(pairs)}
    perfect = score_captions(references, {key: texts[0] for key, texts in references.items()})
    scores = score_captions(references, {str(i): caption for i, (_, caption) in enumerate(pairs)})
    for name, value in scores.as_dict().items():
        assert 0 <= value <= perfect.as_dict()[name] + 1e-6
    for key, value in scores.cider_per_example.items():
        assert value <= perfect.cider_per_example[key] + 1e-6


def test_perfect_captions_score_full_marks():
    references = {"a": ["a red dog runs very fast"], "b": ["two blue cats sleep all day"]}
    scores = score_captions(references, {key: texts[0] for key, texts in references.items()})
    expected = {"BLEU-1": 1.0, "BLEU-2": 1.0, "BLEU-3": 1.0, "BLEU-4": 1.0, "ROUGE-L": 1.0, "CIDEr": 10.0}
    assert scores.as_dict() == pytest.approx(expected, abs=1e-6)


def test_empty_captions_and_a_single_picture():
    empty = score_captions({"a": ["one dog"], "b": ["two cats"]}, {"a": "", "b": ""})
    assert set(empty.as_dict().values()) == {0.0}
    alone = score_captions({"a": ["one dog"]}, {"a": "one dog"})
    assert alone.cider == 0.0
    assert alone.rouge_l == 1.0
    assert set(shuffled_control({"a": ["one dog"]}, {"a": "one dog"}, seed=0).values()) == {0.0}


@pytest.mark.parametrize(
    ("references", "hypotheses", "message"),
    [
        ({"a": ["x"]}, {"b": "x"}, "only one"),
        ({"a": []}, {"a": "x"}, "without a reference"),
        ({}, {}, "no captions"),
    ],
)
def test_unusable_corpora_are_refused(references, hypotheses, message):
    with pytest.raises(ValueError, match=message):
        score_captions(references, hypotheses)


@given(st.integers(2, 200), st.integers(0, 2**32))
def test_derangement(n, seed):
    order = derangement(n, seed)
    assert sorted(order) == list(range(n))
    assert (order != np.arange(n)).all()
    assert (order == derangement(n, seed)).all()


def test_shuffled_control():
    control = shuffled_control(REFERENCES, HYPOTHESES, seed=1)
    assert control == shuffled_control(REFERENCES, HYPOTHESES, seed=1)
    assert control != shuffled_control(REFERENCES, HYPOTHESES, seed=2)
    assert control.keys() == score_captions(REFERENCES, HYPOTHESES).as_dict().keys()
    assert control["CIDEr"] < 0.2 * GOLDEN["scores"]["CIDEr"]
    two = shuffled_control({"a": ["one red dog"], "b": ["two cats"]}, {"a": "two cats", "b": "one red dog"}, seed=0)
    assert two["ROUGE-L"] == pytest.approx(1.0)  # with two pictures the only derangement swaps them
