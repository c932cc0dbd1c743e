"""Caption processing and token encoding."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from simvlg_jax.convert.tokenizers import minilm_tokenizer
from simvlg_jax.data.captions import blip_caption, well_formed
from simvlg_jax.data.text import IGNORE, CaptionText, SentenceText, character_tokenizer
from simvlg_jax.utils.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Dog.", "a dog"),
        ('He said: "stop!" (now); ok~', "he said stop now ok"),
        ("a man's well-known, 2nd hat?", "a man's well-known, 2nd hat?"),
        ("#1 *star*", "1 star"),
        ("two  spaces\n", "two spaces"),
        ("one line\n", "one line"),
        ("\n", ""),
        ("", ""),
        (" ".join(str(i) for i in range(60)), " ".join(str(i) for i in range(50))),
    ],
)
def test_blip_caption(text, expected):
    assert blip_caption(text) == expected


@given(st.text(max_size=80))
def test_blip_caption_is_idempotent_and_leaves_no_listed_sign(text):
    once = blip_caption(text)
    assert blip_caption(once) == once
    assert not set(once) & set('.!"()*#:;~')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\ud83d\ude00!", "\U0001f600!"),
        ("a \ud83d", "a \ufffd"),
        ("\ud83da", "\ufffda"),
        ("\ude00\ud83d\ude00\ud83d\ud83d", "\ufffd\U0001f600\ufffd\ufffd"),
        ("\ufeffcaf\u00e9 \x00 \U0001f600", "\ufeffcaf\u00e9 \x00 \U0001f600"),
    ],
)
def test_lone_surrogates_are_replaced_and_pairs_joined(text, expected):
    assert well_formed(text) == expected


@given(st.text(st.characters(exclude_categories=())))
def test_well_formed_texts_can_be_written_and_stay(text):
    once = well_formed(text)
    assert once.encode() and well_formed(once) == once if text else once == ""


TOKENIZER = character_tokenizer()
PAD, START, END = (TOKENIZER.token_to_id(token) for token in ("<pad>", "<s>", "</s>"))


def letters(text: str) -> list[int]:
    return [TOKENIZER.token_to_id(letter) for letter in text]


def encoder(**options) -> CaptionText:
    settings = dict(start_id=START, end_id=END, pad_id=PAD, max_tokens=8, start_is_target=False)
    return CaptionText(TOKENIZER, **(settings | options))


def test_caption_text_ends_with_a_trained_end_token():
    ids, targets = encoder()("cat")
    assert ids == [START, *letters("cat"), END]
    assert targets == [IGNORE, *letters("cat"), END]


def test_start_token_is_a_target_for_opt():
    ids, targets = encoder(start_is_target=True)("cat")
    assert targets == ids


def test_models_without_start_token():
    ids, targets = encoder(start_id=None)("cat")
    assert ids == targets == [*letters("cat"), END]


@pytest.mark.parametrize("start_is_target", [True, False])
def test_prompt_is_never_a_target(start_is_target):
    ids, targets = encoder(prompt="a ", start_is_target=start_is_target)("cat")
    assert ids == [START, *letters("a cat"), END]
    assert targets == [IGNORE] * 3 + letters("cat") + [END]


def test_long_caption_loses_its_end():
    ids, targets = encoder()("elephants")
    assert ids == [START, *letters("elephan")]
    assert targets == [IGNORE, *letters("elephan")]


def test_prompt_that_fills_the_text_is_refused():
    with pytest.raises(UserError, match="no room"):
        encoder(prompt="a photo of")


def test_sentence_text_has_no_targets_and_keeps_its_end():
    ids, targets = SentenceText(TOKENIZER, max_tokens=5)("elephant")
    assert ids == [START, *letters("ele"), END]
    assert targets == [IGNORE] * 5


def test_minilm_sentences_match_the_tokenizers_own_special_tokens():
    tokenizer = minilm_tokenizer()
    sentence = SentenceText(tokenizer, max_tokens=32)
    tokenizer.no_padding()
    for text in ("woman juggling, medium-dark skin tone", "flag of Cote d'Ivoire", ""):
        assert sentence(text)[0] == tokenizer.encode(text).ids
    assert sentence.pad_id == tokenizer.token_to_id("[PAD]")


def test_padding_and_truncation_of_the_given_tokenizer_are_ignored_and_kept():
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.enable_padding(length=30)
    tokenizer.enable_truncation(2)
    text = CaptionText(tokenizer, START, END, PAD, 8, False)
    assert text("cat")[0] == [START, *letters("cat"), END]
    assert tokenizer.padding and tokenizer.truncation


def test_encoders_travel_to_worker_processes():
    for text in (encoder(prompt="a "), SentenceText(TOKENIZER, 9)):
        copy = pickle.loads(pickle.dumps(text))
        assert copy("dog") == text("dog")
        assert (copy.pad_id, copy.max_tokens) == (text.pad_id, text.max_tokens)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40).filter(lambda text: "<" not in text))
def test_character_tokenizer_round_trip(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


def test_character_tokenizer_replaces_what_it_does_not_know():
    assert TOKENIZER.decode(TOKENIZER.encode("caf\u00e9").ids) == "caf?"
    assert (PAD, START, END, TOKENIZER.get_vocab_size()) == (0, 1, 2, 98)
