"""Caption processing and token encoding."""

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from simvlg_jax.convert.tokenizers import minilm_tokenizer
from simvlg_jax.data.captions import blip_caption, blip_question, well_formed
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


GOLDEN = json.loads((Path(__file__).parent / "golden" / "text_and_answers.json").read_text())["processors"]


def test_processors_equal_the_published_ones():
    assert len(GOLDEN) == 109
    for row in GOLDEN:
        assert blip_caption(row["text"]) == row["caption"]
        assert blip_question(row["text"]) == row["question"]


def test_question_keeps_its_mark_and_fifty_words():
    assert blip_question('What "Colour" is it?  ') == "what colour is it?"
    assert blip_question("a " * 60 + "end?") == " ".join(["a"] * 50)


@given(st.text(max_size=80))
def test_blip_question_is_idempotent_and_leaves_no_listed_sign(text):
    once = blip_question(text)
    assert blip_question(once) == once
    assert not set(once) & set('.!"()*#:;~')


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


CORPUS = ["Question: what colour is the cat? Short answer: black", "a photo of two cats on a red mat", "1.5 dogs"] * 9


def byte_level_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


TOKENIZERS = {"byte-level": byte_level_bpe(), "metaspace": metaspace(), "characters": TOKENIZER}
PROMPTS = ["Question: what colour is the cat? Short answer:", "a photo of", "two dogs? ", "1", "Short answer:\n"]
LETTERS = st.text("abcdefghijklmnopqrstuvwxyz 123.?\u00e9", min_size=1, max_size=30)


def prompted(tokenizer, **options) -> CaptionText:
    settings = dict(start_id=1, end_id=2, pad_id=0, max_tokens=200, start_is_target=True)
    return CaptionText(tokenizer, **(settings | options))


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=st.sampled_from(PROMPTS) | LETTERS.filter(str.strip), text=LETTERS.filter(str.strip))
def test_prompt_and_text_have_the_ids_that_generation_sees(name, prompt, text):
    text, tokenizer = text.strip(), TOKENIZERS[name]
    encoder = prompted(tokenizer)
    ids, targets = encoder(text, prompt)
    between = "" if prompt[-1].isspace() else " "
    whole = tokenizer.encode(prompt.rstrip(" ") + (" " if prompt[-1] == " " else between) + text).ids
    before = tokenizer.encode(prompt.rstrip(" ")).ids
    assert ids == [1, *whole, 2]
    assert encoder.prompt_ids(prompt) == [1, *before] == ids[: 1 + len(before)]
    assert targets == [IGNORE] * (1 + len(before)) + ids[1 + len(before) :]
    assert "".join(tokenizer.decode(ids[1 + len(before) : -1]).split()) == "".join(
        tokenizer.decode(tokenizer.encode(text).ids).split()
    )


def test_without_a_prompt_nothing_changes():
    assert encoder(start_is_target=True)("cat", "") == encoder(start_is_target=True)("cat")


def test_prompt_of_an_example_comes_after_the_fixed_one():
    ids, targets = encoder(prompt="a ", max_tokens=20)("cat", "is:")
    assert ids == [START, *letters("a is: cat"), END]
    assert targets == [IGNORE] * 6 + letters(" cat") + [END]


def test_prompt_that_is_too_long_loses_its_left_side():
    ids, targets = encoder(max_tokens=14)("red", "what colour? answer:")
    assert ids[-5:] == [*letters(" red"), END] == targets[-5:]
    assert ids[1:-5] == letters("what colour? answer:")[-8:] and targets[:-5] == [IGNORE] * 9


def test_text_that_is_too_long_leaves_the_prompt_a_quarter():
    ids, targets = encoder(max_tokens=12)("elephants in rain", "a photo of")
    assert ids == [START, *letters(" of"), *letters(" elephan")]
    assert targets == [IGNORE] * 4 + letters(" elephan")


def test_prompt_for_generation_leaves_room_for_a_token():
    assert encoder(max_tokens=6).prompt_ids("a photo of") == [START, *letters("o of")]


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
