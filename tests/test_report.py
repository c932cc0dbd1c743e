"""The report: its contents, odd captions, missing parts, and the merge map."""

import base64
import io
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from reports import EVIL, SCORES, Page, example, make_run, png, write_results

from simvlg_jax.config.defaults import get_config
from simvlg_jax.evaluation.cost import cost
from simvlg_jax.evaluation.report import charts
from simvlg_jax.evaluation.report.merge_map import merge_map
from simvlg_jax.evaluation.report.page import write_report
from simvlg_jax.utils.errors import UserError
from simvlg_jax.utils.files import read_metrics


def test_report_shows_the_run(tmp_path):
    make_run(tmp_path / "run")
    path = write_report(tmp_path / "run")
    assert path == tmp_path / "run" / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    for words in ("83.1", "20.0", "4.2\u00d7", "50.0 %", "1.250", "16 patches → 6 tokens", "CC BY-SA 4.0", "vit.size"):
        assert words in page.text
    for title in ("Loss", "Validation CIDEr", "Retrieval on validation pictures, %", "Learning rate"):
        assert title in page.texts
    assert ("use", {"href": "#picture-1-0", "transform": "scale(4)"}) in page.tags  # the picture under its merge map
    pictures = [attrs["href"] for tag, attrs in page.tags if tag == "image"]
    assert len(pictures) == 1
    for source in pictures:
        assert Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,")))).size[0] >= 16


def test_report_needs_nothing_from_outside(tmp_path):
    make_run(tmp_path / "run")
    html = write_report(tmp_path / "run").read_text(encoding="utf-8")
    page = Page(html)
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe")]
    assert not [tag for tag, attrs in page.tags if "src" in attrs]
    hrefs = [attrs["href"] for tag, attrs in page.tags if "href" in attrs and tag != "a"]
    assert all(href.startswith(("data:", "#")) for href in hrefs)
    assert not re.search(r"@import|url\(", html)


@pytest.mark.parametrize("caption", [EVIL, "{{ 7 * 7 }} {% raw %}", "x" * 3000, "", "</style></td>"])
def test_captions_are_text_and_nothing_else(tmp_path, caption):
    make_run(tmp_path / "run", caption=caption)
    page = Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    assert [tag for tag, attrs in page.tags if tag == "script" or "onerror" in attrs] == ["script"]  # our own
    assert " ".join(caption.split()) in page.text


def test_answers_are_shown_with_their_question_and_by_how_many_people(tmp_path):
    answers = ["red", "blue", "red", EVIL]
    asked = example(0, question=EVIL, references=answers, caption="red", score=1.0, image=png(), source_map=None)
    write_results(
        tmp_path,
        type="questions",
        headline="accuracy",
        scores={"accuracy": 0.755, "accuracy yes/no": 0.5},
        shuffled={"accuracy": 0.25},
        interval=[0.701, 0.81],
        groups={"north": {"accuracy": 0.1234, "num_examples": 1}, EVIL: {"accuracy": 1.0, "num_examples": 1}},
        examples=[asked, example(1, question="?", references=["1"], score=0.3)],
    )
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    for words in ("75.5 %", "25.0 %", "3.0\u00d7", "70.1 % to 81.0 %", "accuracy yes/no 50.0 %", "accuracy 30 %"):
        assert words in page.text
    assert f"north 1 12.34 % {EVIL} 1 100.00 %" in page.text
    assert "✓ accuracy 100 %" in page.text
    assert page.text.count("2\u00d7 red · 1\u00d7 blue · 1\u00d7 " + EVIL) == 2  # on the card and in the table
    assert "CIDEr" not in page.text.partition("How to read this")[0]


def test_each_layer_has_its_drawing_and_each_token_its_loss(tmp_path):
    layers = [[0, 1, 2, 2], [0, 1, 1, 1], [0, 0, 0, 0]]
    tokens = [["a", 0.25], [" " + EVIL, 4.0], ["</s>", float("nan")]]
    write_results(
        tmp_path,
        type="captioning",
        headline="CIDEr",
        scores=SCORES,
        interval=None,
        examples=[example(0, score=0.5, image=png(), source_map=layers[-1], layers=layers, tokens=tokens)],
    )
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    drawn = [attrs for tag, attrs in page.tags if attrs.get("class") == "layer"]
    assert [attrs["data-tokens"] for attrs in drawn] == ["3", "2", "1"]
    assert [attrs.get("display") for attrs in drawn] == ["none", "none", None]  # without scripts: the last one
    heats = [attrs["style"] for _, attrs in page.tags if attrs.get("style", "").startswith("--heat")]
    assert heats == ["--heat: 6", "--heat: 100", "--heat: 100"]
    assert EVIL + " 4.0" in page.text
    (card,) = [attrs for _, attrs in page.tags if attrs.get("class") == "card"]
    assert (card["data-score"], card["data-loss"]) == ("0.5", "1.0")
    assert card["data-words"] == "0  a cat a dog"


def test_settings_that_differ_from_the_default_are_listed(tmp_path):
    config = json.loads(get_config().to_json())
    config["train"]["steps"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    steps = config["train"]["steps"]
    assert f"Different from the default key this run default train.steps {steps} {steps - 1}" in text
    (tmp_path / "config.json").write_text(get_config().to_json())
    assert "Different from the default" not in Page(write_report(tmp_path).read_text(encoding="utf-8")).text


def test_missing_pieces_are_named(tmp_path):
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert "Nothing is scored yet" in text
    assert "No metrics.jsonl" in text
    assert "No pre-training of the vision encoder" in text
    assert "No config.json" in text
    assert "OpenMoji" not in text


def test_results_of_retrieval_and_of_older_runs_are_shown(tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "test.json").write_text('{"split": "test", "R@1": 0.375, "R@5": 0.75, "loss": 1.5}')
    (tmp_path / "eval" / "val.json").write_text('{"scores": {"CIDEr": 0.5}, "examples": []}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "kind": "train", "loss": 2.0}\n[]\nnonsense\n')
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert "37.5 %" in text
    assert "50.0" in text


def test_seconds_are_the_median_of_the_batches_that_compiled_nothing():
    retrieval = SimpleNamespace(captions=False)
    batches = [{"seconds": each} for each in (None, 0.5, 9.0, 0.25)]
    assert cost(retrieval, {}, batches) == {"visual_tokens": None, "seconds_per_picture": 0.5}
    assert cost(retrieval, {}, [{"seconds": None}, {}])["seconds_per_picture"] is None


def test_report_is_replaced_whole(tmp_path):
    make_run(tmp_path / "run")
    first = write_report(tmp_path / "run").read_text(encoding="utf-8")
    (tmp_path / "run" / "eval" / "test.json").write_text('{"split": "te')
    with pytest.raises(UserError, match=r"test\.json is not valid JSON"):
        write_report(tmp_path / "run")
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8") == first
    assert not list((tmp_path / "run").glob(".*"))


def test_report_verb(tmp_path):
    make_run(tmp_path / "run")
    command = [sys.executable, "-m", "simvlg_jax.report", "--workdir"]
    done = subprocess.run([*command, str(tmp_path / "run")], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "run" / "report.html"))
    failed = subprocess.run([*command, str(tmp_path / "absent")], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: no run at")


def test_read_metrics_leaves_out_what_was_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_span_the_range_in_round_steps(low, width):
    values = charts.ticks(low, low + width)
    rounding = 1e-6 * max(abs(low), abs(low + width), 1)
    assert values[0] <= low + rounding
    assert values[-1] >= low + width - rounding
    assert 2 <= len(values) <= 8


values = st.floats(-1e30, 1e30) | st.sampled_from([float("nan"), float("inf"), -float("inf")])


@given(st.dictionaries(st.integers(0, 10**6), values, max_size=500))
def test_chart_stays_inside_its_frame(values):
    chart = charts.line_chart("x", {"line": sorted(values.items())})
    if not any(np.isfinite(list(values.values()))):
        assert chart is None
        return
    numbers = [float(n) for n in re.findall(r"-?[\d.]+(?:e-?\d+)?", chart.series[0].path)]
    assert all(charts.LEFT <= x <= charts.WIDTH - charts.RIGHT for x in numbers[::2])
    assert all(charts.TOP <= y <= charts.HEIGHT - charts.BOTTOM for y in numbers[1::2])


def cells(path: str) -> set[tuple[int, int]]:
    """The (column, row) of the patches that a path of `merge_map` fills."""
    assert re.fullmatch(r"(M\d+ \d+h\d+)*", path)
    runs = re.findall(r"M(\d+) (\d+)h(\d+)", path)
    return {(int(x) + i, int(y)) for x, y, length in runs for i in range(int(length))}


@given(st.integers(1, 6), st.integers(0, 1), st.data())
def test_merge_map_tints_what_was_merged(grid, class_token, data):
    """Of every layer: a tint covers exactly the patches of one token, and all tints what was merged."""
    size = grid * grid + class_token
    maps, count = [list(range(size))], size
    for _ in range(data.draw(st.integers(1, 4))):
        slots = data.draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count))
        order = {slot: place for place, slot in enumerate(sorted(set(slots)))}
        maps.append([order[slots[token]] for token in maps[-1]])
        count = len(order)
    drawn = merge_map(maps)
    assert drawn.grid == grid
    for source_map, layer in zip(maps, drawn.layers, strict=True):
        patches = {}
        for place, token in enumerate(source_map[class_token:]):
            patches.setdefault(token, set()).add((place % grid, place // grid))
        merged = [group for group in patches.values() if len(group) > 1]
        assert sorted(map(sorted, merged)) == sorted(sorted(cells(path)) for _, path in layer.tints)
        assert cells(layer.merged) == set().union(*merged)
        assert layer.tokens == len(set(source_map))
        with_class = patches.get(source_map[0], set()) if class_token else set()
        assert {(x - 0.5, y - 0.5) for x, y in layer.dots} == with_class


@given(st.integers(1, 5), st.data())
def test_lines_of_a_layer_are_its_own_and_those_of_later_ones(grid, data):
    """Drawn together, they are the lines of the layer alone, and none is drawn twice."""
    maps = [list(range(grid * grid))]
    for _ in range(data.draw(st.integers(1, 3))):
        slots = data.draw(st.lists(st.integers(0, grid * grid - 1), min_size=grid * grid, max_size=grid * grid))
        maps.append([slots[token] for token in maps[-1]])
    drawn = merge_map(maps).layers
    for place, source_map in enumerate(maps):
        together = [segment for layer in drawn[place:] for segment in segments(layer.lines)]
        assert sorted(together) == sorted(segments(merge_map([source_map]).layers[0].lines))


def segments(path: str) -> list[tuple[int, int, str]]:
    """The (column, row, direction) of the lines of length 1 that a path of lines draws."""
    runs = [(int(x), int(y), way, int(length)) for x, y, way, length in re.findall(r"M(\d+) (\d+)([hv])(\d+)", path)]
    return [(x + i * (way == "h"), y + i * (way == "v"), way) for x, y, way, length in runs for i in range(length)]


def test_a_token_keeps_the_tint_of_its_largest_part():
    before, after = merge_map([[0, 0, 1, 1, 1, 2, 3, 3, 2], [0, 0, 0, 0, 0, 1, 1, 1, 1]]).layers
    tints = {colour: cells(path) for colour, path in before.tints}
    for colour, path in after.tints:
        assert tints[colour] <= cells(path)
    assert len(tints) == len(before.tints) == 4


def test_merge_map_has_lines_between_tokens_only():
    (layer,) = merge_map([[9, 1, 2, 1, 3]]).layers  # 2 x 2 patches: the left column is one token
    (without_class,) = merge_map([[1, 2, 1, 3]]).layers
    assert (layer.lines, layer.tints) == (without_class.lines, without_class.tints)
    assert set(re.findall(r"M\d+ \d+[hv]\d+", layer.lines)) == {
        "M0 0h2", "M0 2h2", "M0 0v2", "M2 0v2",  # around
        "M1 0v2", "M1 1h1",  # between the columns, and between the right patches
    }  # fmt: skip


@pytest.mark.parametrize("length", [0, 3, 18])
def test_merge_map_needs_a_square_of_patches(length):
    with pytest.raises(ValueError, match="square of patches"):
        merge_map([[0] * length])
