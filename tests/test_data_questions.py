"""Questions, answers and prompts, from a record to the arrays that the model gets."""

from collections import Counter

import numpy as np
import pytest
from test_data_pipeline import SENTENCE, Numbered, config, take

from simvlg_jax.data.batch import BatchSpec, Pictures, TextSpec
from simvlg_jax.data.captions import CLEANERS, CaptionError
from simvlg_jax.data.pipeline import make_eval_batches, make_train_iterator
from simvlg_jax.data.skipped import Skipped
from simvlg_jax.data.sources import QUESTION_PROMPT, TextSource
from simvlg_jax.data.text import IGNORE, CaptionText, character_tokenizer
from simvlg_jax.utils.errors import UserError

ANSWERS = ["red"] * 6 + ["Dark red."] * 3 + ["ruby"]
LONG = CaptionText(character_tokenizer(), start_id=1, end_id=2, pad_id=0, max_tokens=64, start_is_target=True)
LAYOUT = BatchSpec(Pictures(8), {"caption": TextSpec(64, True, lambda: LONG)} | SENTENCE)


class Questions(Numbered):
    """Every record asks the same question."""

    def __init__(self, count, answers=tuple(ANSWERS), question='What "Colour" is it?', damaged=()):
        super().__init__(count, damaged)
        self.answers, self.question = list(answers), question

    def __getitem__(self, index):
        record = super().__getitem__(index)
        return record | {"question": self.question, "references": self.answers, "caption": "unused"}


def texts(source, clean="", prompt="", training=True):
    return TextSource(source, CLEANERS[clean], prompt, training)


def train(source, count, **options):
    settings = {"batch_size": 8, "seed": 3} | options
    return take(make_train_iterator(config(pad_multiple=0), source, LAYOUT, **settings), count)


def decoded(ids, chosen) -> str:
    return LONG.tokenizer.decode(ids[chosen].tolist(), skip_special_tokens=True)


def prompts_and_targets(batch) -> list[tuple[str, str]]:
    rows = zip(batch["caption_ids"], batch["caption_mask"] == 1, batch["caption_targets"] != IGNORE, strict=True)
    return [(decoded(ids, mask & ~target), decoded(ids, mask & target)) for ids, mask, target in rows]


PROMPT = "Question: what colour is it? Short answer:"


def test_question_is_the_prompt_and_answers_are_drawn_by_their_counts():
    seen = Counter()
    for batch in train(texts(Questions(64), "blip_caption"), 50):
        for prompt, answer in prompts_and_targets(batch):
            assert prompt == PROMPT
            seen[answer.strip()] += 1
        for sentence, mask in zip(batch["sentence_ids"], batch["sentence_mask"] == 1, strict=True):
            assert decoded(sentence, mask) in ("red", "Dark red.", "ruby")  # without the question
    assert seen.keys() == set(ANSWERS)
    for answer, count in seen.items():
        assert count / 400 == pytest.approx(ANSWERS.count(answer) / 10, abs=0.08)


def test_answers_of_a_view_follow_from_the_seed():
    first, again = (train(texts(Questions(16)), 4) for _ in range(2))
    for batch, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(batch["caption_ids"], other["caption_ids"])


def test_evaluation_takes_the_most_frequent_answer_and_of_equal_ones_the_first():
    assert texts(Questions(1), training=False)[0]["caption"] == "red"
    assert texts(Questions(1, ["b", "a", "a", "b", "c"]), training=False)[0]["caption"] == "b"
    assert texts(Questions(1, []), training=False)[0]["caption"] == ""


@pytest.mark.parametrize(
    ("clean", "prompt", "expected"),
    [
        ("", "", 'Question: What "Colour" is it? Short answer:'),
        ("blip_caption", "", PROMPT),
        ("blip_caption", "{} In {a} word:", "what colour is it? In {a} word:"),
    ],
)
def test_question_is_cleaned_and_put_in_the_prompt(clean, prompt, expected):
    assert texts(Questions(1), clean, prompt)[0]["prompt"] == expected
    assert QUESTION_PROMPT.count("{}") == 1


def test_prompt_of_captions_is_never_a_target():
    (batch,) = train(texts(Numbered(8), prompt="a photo of number"), 1)
    found = prompts_and_targets(batch)
    assert sorted(found) == [("a photo of number", f" {number}") for number in range(8)]


@pytest.mark.parametrize(
    ("source", "prompt", "has"),
    [(Numbered(8), "Question: {} Answer:", "no question"), (Questions(8), "a photo of", "a question")],
)
def test_prompt_that_does_not_fit_the_records_is_refused(source, prompt, has):
    with pytest.raises(UserError, match=f"record 0 has {has}") as raised:
        texts(source, prompt=prompt)[0]
    assert raised.value.status == 2
    with pytest.raises(UserError, match=has):
        train(texts(source, prompt=prompt), 1)


@pytest.mark.parametrize("source", [Questions(8, []), Questions(8, ["a", " "]), Questions(8, question="")])
def test_question_that_cannot_be_trained_on_is_skipped_and_counted(source):
    skipped = Skipped()
    layout = BatchSpec(None, LAYOUT.texts)
    data = config(max_skipped=1.0)
    batch = next(make_train_iterator(data, texts(source), layout, batch_size=8, seed=3, skipped=skipped))
    assert skipped.counts == {"caption": 8} and not batch["weight"].any()


class Captions(Numbered):
    def __init__(self, captions):
        super().__init__(len(captions))
        self.captions = captions

    def __getitem__(self, index):
        return super().__getitem__(index) | {"caption": self.captions[int(index)]}


def test_empty_caption_is_an_error_of_training_only():
    source = Captions([" \n", "cat"])
    with pytest.raises(CaptionError, match="the caption is empty"):
        texts(source)[0]
    assert texts(source, training=False)[0]["caption"] == " \n"
    assert texts(source)[1]["caption"] == "cat"


@pytest.mark.parametrize(
    "caption", ["\ud800 cat", "\x00", "x" * 100_000, "\u202e\U0001f9d1\u200d\U0001f680", "<s></s>"]
)
def test_odd_captions_become_rows_of_the_layout(caption):
    (batch,) = train(texts(Captions([caption] * 8)), 1)
    assert batch["caption_ids"].shape == (8, 64) and batch["weight"].all()


def evaluated(source, **options):
    return list(make_eval_batches(source, LAYOUT, batch_size=4, **options))


def test_evaluation_batches_carry_what_the_captions_continue():
    source = texts(Questions(6, damaged={1}), "blip_caption", training=False)
    first, second = evaluated(source)
    assert first["prompt_ids"].shape == first["prompt_mask"].shape == (4, 63)
    for batch in (first, second):
        for index, weight, ids, mask in zip(
            *(batch[name] for name in ("index", "weight", "prompt_ids", "prompt_mask")), strict=True
        ):
            assert mask.tolist() == sorted(mask.tolist())  # padded on the left
            assert decoded(ids, mask == 1) == (PROMPT if weight else ""), index
        for ids, prompt, mask in zip(batch["caption_ids"], batch["prompt_ids"], batch["prompt_mask"], strict=True):
            count = mask.sum()
            assert ids[1 : 1 + count].tolist() == prompt[len(prompt) - count :].tolist()  # as in the loss
    assert [batch["prompt_ids"].shape for batch in evaluated(source, pad_multiple=8)] == [(4, 48)] * 2


def test_evaluation_without_prompts_has_no_arrays_for_them():
    (batch,) = evaluated(texts(Numbered(4), training=False))
    assert not any(name.startswith("prompt") for name in batch)
    layout = BatchSpec(Pictures(8), SENTENCE)  # nothing is predicted
    (batch,) = make_eval_batches(texts(Questions(4), training=False), layout, batch_size=4)
    assert not any(name.startswith("prompt") for name in batch)
