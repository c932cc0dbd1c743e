"""The questions about OpenMoji: answers follow from the metadata, splits share no picture, and no answer is common."""

import json
import re
from collections import Counter

import flax.linen as nn
import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from flax import traverse_util
from ml_collections import ConfigDict

from simvlg_jax.config.load import load_config
from simvlg_jax.config.saved import EXAMPLE
from simvlg_jax.convert import own_files
from simvlg_jax.data.openmoji.answers import QUESTIONS, ask
from simvlg_jax.data.openmoji.questions import MOST, main, questions_of
from simvlg_jax.data.openmoji.scores import Score, frequent_answers, score
from simvlg_jax.data.openmoji.splits import SPLITS, base_of
from simvlg_jax.data.sources import QUESTION_PROMPT, load_source
from simvlg_jax.data.text import IGNORE
from simvlg_jax.data.transforms import decode
from simvlg_jax.tasks import build_task
from simvlg_jax.tasks.build import build_text_encoder
from simvlg_jax.training.restore import WEIGHTS

TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
HAIR = {"1F9B0": "red", "1F9B1": "curly", "1F9B2": "bald", "1F9B3": "white", "1F471": "blond"}
GENDERS = {"2642": "man", "1F468": "man", "2640": "woman", "1F469": "woman", "1F9D5": "woman"}  # the last in headscarf
PEOPLE = {*("1F466", "1F467", "1F468", "1F469", "1F9D1", "1F9D2")}


@pytest.mark.parametrize(
    ("codes", "name", "answers"),
    [
        ("1F33D", "ear of corn", {"kind": "food"}),
        ("1F1EB 1F1EE", "flag of Finland", {"kind": "flag"}),
        ("1F983", "turkey", {"kind": "animal"}),
        ("1F43E", "paw prints", {}),
        ("1F96D", "mango", {"kind": "food"}),
        ("1F45E", "man's shoe", {"kind": "clothing"}),
        ("1F44B 1F3FC", "waving hand, medium-light skin tone", {"tone": "medium-light"}),
        ("1F468 1F3FF", "man, dark skin tone", {"tone": "dark", "gender": "man", "number": "one"}),
        ("1F469 1F9B2", "bald woman", {"hair": "bald"}),
        (
            "1F468 1F9B0",
            "man with red hair",
            {"gender": "man", "hair": "red", "number": "one"},
        ),
        (
            "1F3C3 1F3FD 200D 2640 FE0F 200D 27A1 FE0F",
            "woman running facing right, medium skin tone",
            {"tone": "medium", "number": "one", "facing": "right", "action": "running"},
        ),
        ("1F9D1 200D 1F9AF", "person with white cane", {"number": "one", "facing": "left"}),
        ("1F468 200D 1F33E", "man farmer", {"gender": "man", "number": "one", "job": "farmer"}),
        ("1F9D1 200D 1F33E", "farmer", {"number": "one", "job": "farmer"}),
        ("1F9D4 200D 2640", "woman with a beard", {"number": "one"}),
        ("1F469 200D 1F37C", "woman feeding baby", {"gender": "woman"}),
        ("1F46B", "woman and man holding hands", {"number": "two"}),
        ("1F46F", "women with bunny ears, light and dark skin tones", {"number": "two"}),
        ("1F468 200D 2764 200D 1F468", "kiss, two men, light and dark skin tones", {"number": "two"}),
        ("1F468 200D 1F469 200D 1F467", "family of man, woman and girl", {"number": "three"}),
        ("1F469 200D 1F467 200D 1F467", "family of woman and two girls", {"number": "three"}),
        ("1F9D1 200D 1F9D1 200D 1F9D2 200D 1F9D2", "family of two adults and two children", {"number": "four"}),
        ("1F46A", "family", {}),
        ("1F491", "couple with heart", {}),
    ],
)
def test_answers_follow_from_the_name_and_the_code_points(codes, name, answers):
    assert ask(codes.split(), name) == answers


@pytest.fixture(scope="module")
def prepared(openmoji_data, tmp_path_factory):
    """The folder that the command writes."""
    folder = tmp_path_factory.mktemp("questions")
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["--output", str(folder / "made"), "--data_dir", openmoji_data.dir]
        patch.setattr("sys.argv", ["questions", *arguments])
        main()
    return folder / "made"


@pytest.fixture(scope="module")
def rows(prepared):
    """Split -> the list that was prepared."""
    return {split: json.loads((prepared / "source" / f"{split}.json").read_text()) for split in SPLITS}


def codes_of(row):
    return re.fullmatch(r"pictures/(.+)\.png", row["image"])[1].upper().split("-")


def asked(rows, *kinds):
    """(code points, answer) of all questions of these kinds."""
    words = {QUESTIONS[kind] for kind in kinds}
    found = [(codes_of(row), row["answer"]) for split in rows.values() for row in split if row["question"] in words]
    assert found
    return found


def test_answers_agree_with_the_code_points_of_every_picture(rows):
    for codes, answer in asked(rows, "tone"):
        assert {TONES[code] for code in codes if code in TONES} == {answer}
    for codes, answer in asked(rows, "hair"):
        assert {HAIR[code] for code in codes if code in HAIR} == {answer}
    for codes, answer in asked(rows, "gender"):
        signs = {GENDERS[code] for code in codes if code in GENDERS}
        assert signs == {answer}, codes
    for codes, answer in asked(rows, "facing"):
        assert ("27A1" in codes) == (answer == "right")
    for codes, answer in asked(rows, "number"):
        counted = sum(code in PEOPLE for code in codes)
        assert counted in (0, 1 + ["one", "two", "three", "four"].index(answer)), codes  # 0: one code for the scene


def test_no_picture_is_in_two_splits_and_held_out_kinds_are_of_new_emoji(rows):
    pictures = {split: {row["image"] for row in rows[split]} for split in SPLITS}
    assert sum(map(len, pictures.values())) == len(set().union(*pictures.values()))
    bases = {split: {base_of(codes_of(row)) for row in rows[split]} for split in SPLITS}
    assert not bases["novel"] & bases["train"]
    kinds = [row["answer"] for row in rows["novel"] if row["question"] == QUESTIONS["kind"]]
    assert len(kinds) >= 40 and len(set(kinds)) >= 5


def test_answers_are_balanced_so_that_the_most_frequent_one_is_a_weak_guess(rows):
    for split in SPLITS:
        counts = Counter(row["question"] for row in rows[split])
        assert max(counts.values()) <= MOST[split] + 5
        assert score(results(rows[split]), frequent_answers(rows["train"]))["all"].frequent < 1 / 3
    assert {row["question"] for row in rows["train"]} == set(QUESTIONS.values())
    assert {row["answer"] for split in ("test", "novel") for row in rows[split]} <= {
        row["answer"] for row in rows["train"]
    }


def results(rows):
    """As of a model that always answers "left"."""
    return [{"question": row["question"], "references": [row["answer"]], "caption": "left"} for row in rows]


def test_scores_of_guesses_by_question():
    train = [{"question": "p", "answer": answer} for answer in "aab"]
    train += [{"question": "q", "answer": answer} for answer in "ddcc"]
    assert frequent_answers(train) == {"p": "a", "q": "c"}
    said = {"p": ["ab", "bb", "bb", "ca"], "q": ["cd"]}  # the right answer, the model's
    examples = [{"question": q, "references": [pair[0]], "caption": pair[1]} for q in said for pair in said[q]]
    # The first answer, b, is that of two other records, each of the next two that of one, and a that of one.
    expected = Score(4, 2 / 4, (2 + 1 + 1 + 1) / 12, 1 / 4)
    found = score(examples, frequent_answers(train))
    assert found["p"] == pytest.approx(expected) and found["q"] == (1, 0, 0, 1)
    assert found["all"] == pytest.approx((5, 2 / 5, 5 / 12 * 4 / 5, 2 / 5))


def test_what_is_asked_does_not_depend_on_the_order_of_the_pictures():
    pictures = [(f"1f4{n:02x}", "animal") for n in range(40)] + [(f"1f60{n:x}", "smiley") for n in range(16)]
    chosen = questions_of(pictures, 20)
    assert questions_of(pictures[::-1], 20) == chosen
    assert Counter(row["answer"] for row in chosen) == {"animal": 10, "smiley": 10}
    assert chosen != sorted(chosen, key=lambda row: row["question_id"])


def test_prepared_set_opens_with_our_reader_and_with_tfds(prepared, rows):
    for split in SPLITS:
        source = load_source(ConfigDict({"name": "prepared", "path": str(prepared)}), split, training=True)
        found = [(source.info(i).id, source.info(i).question, source.info(i).references) for i in range(len(source))]
        assert found == [(row["question_id"], row["question"], [row["answer"]]) for row in rows[split]]
    record = source[0]
    assert record["prompt"] == QUESTION_PROMPT.replace("{}", rows["novel"][0]["question"])
    assert decode(record["image"]).size == (64, 64)
    (first, *_) = tfds.builder_from_directory(str(prepared)).as_data_source("novel")
    assert first["question"].decode() == rows["novel"][0]["question"] and first["image"].shape == (64, 64, 3)


def test_no_question_with_its_answer_is_too_long_for_the_config(rows):
    config = load_config("configs/openmoji.py:questions")
    encoder = build_text_encoder(config)
    for row in (row for split in rows.values() for row in split):
        ids, targets = encoder(row["answer"], QUESTION_PROMPT.replace("{}", row["question"]))
        assert ids[-1] == encoder.end
        assert sum(target != IGNORE for target in targets) <= config.evals.test.decoding.max_new_tokens


def test_the_config_starts_from_the_weights_of_the_trained_example():
    task = build_task(load_config("configs/openmoji.py:questions"))
    abstract = nn.unbox(jax.eval_shape(task.init, jax.random.key(0)))
    loaded = traverse_util.flatten_dict(task.load_pretrained(abstract), sep="/")  # checks every name and shape
    assert loaded.keys() == traverse_util.flatten_dict(abstract, sep="/").keys()
    saved = own_files.read_flat(EXAMPLE / WEIGHTS)
    for name in ("llm_proj/kernel", "connector/vl_proj/kernel", "ln_vision/scale"):
        np.testing.assert_array_equal(np.asarray(loaded[name], np.float32), saved[name].astype(np.float32))
