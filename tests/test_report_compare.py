"""The comparison of runs: its numbers, charts and pictures, and its messages."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from reports import EVIL, Page, example, png, write_results
from verbs import call

from simvlg_jax import compare
from simvlg_jax.config.defaults import get_config
from simvlg_jax.evaluation.report.compare import write_comparison
from simvlg_jax.evaluation.report.pictures import data_url, picture_text, read_pictures


def write_run(folder, scores, tokens=8, split="test", captions=None, **values):
    """Writes a run whose score is the mean of the scores of its examples."""
    captions = captions or [f"caption {score}" for score in scores]
    pairs = zip(scores, captions, strict=True)
    results = {
        "headline": "CIDEr",
        "scores": {"CIDEr": sum(scores) / len(scores)},
        "shuffled": {"CIDEr": 0.1},
        "interval": [0.2, 0.9],
        "visual_tokens": tokens,
        "seconds_per_picture": tokens / 100,
        "examples": [example(place, score=score, caption=caption) for place, (score, caption) in enumerate(pairs)],
    }
    write_results(folder, split, **{**results, **values})
    config = get_config()
    config.connector.tokens = tokens
    (folder / "config.json").write_text(config.to_json())
    return folder


def compared(tmp_path, *runs) -> Page:
    return Page(write_comparison(runs, tmp_path / "out" / "compare.html").read_text(encoding="utf-8"))


def test_scores_settings_and_the_greatest_changes_are_shown(tmp_path):
    before = [0.5, 1.0, 0.25, 0.75]
    first = write_run(tmp_path / "first", before, captions=["a", "b", "c", "same"])
    other = write_run(tmp_path / "other", [0.75, 0.0, 0.25, 0.75], tokens=4, captions=[EVIL, "y", "z", "same"])
    for folder, loss in ((first, 2.0), (other, 1.0)):
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 5, "kind": "train", "loss": loss}))
    page = compared(tmp_path, first, other)
    for words in ("62.5", "43.8", "20.0 to 90.0", "\u221218.8 compared with first", "connector.tokens 8 4", "0.08"):
        assert words in page.text
    assert " ".join(EVIL.split()) in page.text
    assert [tag for tag, attrs in page.tags if tag == "script" or "onerror" in attrs] == ["script"]
    cards = [attrs for _, attrs in page.tags if attrs.get("class") == "card"]
    assert [float(card["data-change"]) for card in cards] == [-1.0, 0.25, 0.0]  # equal captions are not shown
    assert "All differing texts" in page.text
    titles = [
        attrs["aria-label"] for tag, attrs in page.tags if tag == "svg" and attrs["viewbox"].startswith("0 0 560")
    ]
    assert titles == [
        "CIDEr of test by visual tokens over visual tokens",
        "Seconds per picture of test by visual tokens over visual tokens",
        "Training loss, smoothed over steps",
    ]


def test_a_difference_has_the_interval_of_the_shared_examples(tmp_path):
    """A run that is better on each picture by the same amount has an interval of no width."""
    scores = np.linspace(0.1, 0.9, 20).tolist()
    first = write_run(tmp_path / "first", scores)
    better = [score + 0.125 for score in scores]
    examples = [example(place, score=score, caption="a cat") for place, score in enumerate(better)]
    for row in examples[15:]:
        row["references"] = ["another picture with the same id"]
    other = write_run(tmp_path / "other", better, examples=examples)
    page = compared(tmp_path, first, other)
    assert "+12.5 compared with first · 95 % interval +12.5 to +12.5 , over the 15 pictures that both have" in page.text


def test_lines_over_tokens_join_runs_that_differ_in_nothing_else(tmp_path):
    runs = [write_run(tmp_path / f"run{tokens}", [0.5, tokens / 100], tokens) for tokens in (8, 2, 4)]
    other = json.loads((runs[1] / "config.json").read_text())
    other["llm"]["size"] = "another"
    (runs[1] / "config.json").write_text(json.dumps(other))
    page = compared(tmp_path, *runs)
    assert "own picture, like run8" in page.text and "own picture, like run2" in page.text
    assert "llm.size" in page.text
    lines = [attrs["d"] for tag, attrs in page.tags if tag == "path" and attrs["class"].startswith("line ")]
    # The line of run8 and run4 has two points, that of run2 one; the others are intervals, of a bar for each run.
    assert sorted(line.count("L") for line in lines if "V" not in line)[-1] == 1
    assert sorted(line.count("V") for line in lines if "V" in line) == [1, 2]


def test_answers_are_compared_with_their_questions(tmp_path):
    runs = []
    for name, answer in (("first", "red"), ("other", "blue")):
        asked = [
            example(0, question=EVIL, references=["red", "blue", "red"], caption=answer, score=float(answer == "red"))
        ]
        runs.append(tmp_path / name)
        right = {"accuracy": asked[0]["score"]}
        write_results(runs[-1], type="questions", headline="accuracy", scores=right, shuffled=right, examples=asked)
    page = compared(tmp_path, *runs)
    for words in (EVIL, "2\u00d7 red · 1\u00d7 blue", "\u2212100.0 % compared with first", "no config.json"):
        assert " ".join(words.split()) in page.text


def test_retrieval_has_no_examples_to_compare(tmp_path):
    for name, score in (("first", 0.25), ("other", 0.5)):
        write_results(tmp_path / name, type="retrieval", headline="R@1", scores={"R@1": score, "R@5": 0.75})
    page = compared(tmp_path, tmp_path / "first", tmp_path / "other")
    assert "25.0 %" in page.text and "50.0 %" in page.text and "compared with" not in page.text


def test_pictures_come_from_the_results_or_else_from_the_data(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for number, colour in enumerate(("red", "lime", "blue")):
        Image.new("RGB", (20, 10), colour).save(data / f"{number}.png")
    lines = [json.dumps({"image": f"{n}.png", "caption": "a dog", "split": "test"}) for n in range(3)]
    (data / "captions.jsonl").write_text("\n".join(lines))
    run = write_run(tmp_path / "run", [0.5])
    config = get_config()
    config.data.name, config.data.path = "folder", str(data)
    (run / "config.json").write_text(config.to_json())

    found = read_pictures(run, "test", {0: "0.png", 1: "1.png", 2: "another id", 3: "3.png"})
    assert list(found) == ["0.png", "1.png"]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["1.png"]))))
    assert pixels.shape == (96, 96, 3) and (pixels == [0, 255, 0]).all()
    config.data.path = str(tmp_path / "gone")
    (run / "config.json").write_text(config.to_json())
    assert read_pictures(run, "test", {0: "0.png"}) == {}
    assert f"no pictures of test, since the data of {run} cannot be read" in capsys.readouterr().err

    first, other = (
        write_run(
            tmp_path / name,
            [0.5, score],
            examples=[example(0, score=score, caption=name, image=png()), example(1, score=score, caption=name)],
        )
        for name, score in (("a", 0.5), ("b", 1.0))
    )
    page = compared(tmp_path, first, other)
    assert [attrs["href"] for tag, attrs in page.tags if tag == "image"] == [f"data:image/png;base64,{png()}"]


def test_photographs_are_jpeg_and_small_drawings_keep_their_pixels():
    drawing = np.zeros((64, 64, 3), np.uint8)
    drawing[:32] = (10, 200, 30)
    photograph = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
    for pixels, kind in ((drawing, "PNG"), (photograph, "JPEG")):
        text = picture_text(pixels)
        picture = Image.open(io.BytesIO(base64.b64decode(text)))
        assert picture.format == kind and picture.size == pixels.shape[-2:-4:-1]
        assert data_url(text).startswith(f"data:image/{kind.lower()};base64,")
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(picture_text(drawing))))) == drawing).all()


@pytest.mark.parametrize(
    ("runs", "output", "message"),
    [
        (["first"], "x.html", "nothing to compare with only one run"),
        (["first", "other", "first"], "x.html", "a run is named twice"),
        (["first", "empty"], "x.html", "empty holds no results (eval/*.json); write them with simvlg_jax.evaluate"),
        (["first", "absent"], "x.html", "absent holds no results"),
        (["first", "val"], "x.html", "no split in common that is scored in the same way; evaluate one with --split:"),
        (["first", "answers"], "x.html", "answers: test (accuracy)"),
        (["first", "other"], "", "name a file that ends in .html"),
    ],
)
def test_what_cannot_be_compared_gives_one_message(tmp_path, capsys, runs, output, message):
    write_run(tmp_path / "first", [0.5])
    write_run(tmp_path / "other", [0.5])
    write_run(tmp_path / "val", [0.5], split="val")
    write_results(tmp_path / "answers", headline="accuracy", scores={"accuracy": 0.5})
    (tmp_path / "empty").mkdir()
    arguments = [*(tmp_path / run for run in runs), "--output", tmp_path / output]
    assert call(compare, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error:") == 1 and "Traceback" not in error
    assert not list(tmp_path.glob("*.html"))


def test_verb_prints_the_path_and_names_runs_of_one_name_by_their_folders(tmp_path, capsys):
    runs = [write_run(tmp_path / folder / "run", [0.5]) for folder in "ab"]
    assert call(compare, *runs, "--output", tmp_path / "x.html") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "x.html")
    text = Page((tmp_path / "x.html").read_text(encoding="utf-8")).text
    assert all(str(run) in text for run in runs)
    assert "All settings are the same" in text
