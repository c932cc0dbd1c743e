"""The report: its contents, odd captions, missing parts, and the merge map."""

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from simvlg_jax.evaluation.report import charts
from simvlg_jax.evaluation.report.merge_map import merge_map
from simvlg_jax.evaluation.report.page import write_report
from simvlg_jax.utils.errors import UserError
from simvlg_jax.utils.files import read_metrics

EVIL = "<script>alert(\"x\")</script> & 'quote' <img src=x onerror=y> \u202e 🙂"
SCORES = {"BLEU-1": 0.5, "BLEU-2": 0.4, "BLEU-3": 0.3, "BLEU-4": 0.2, "ROUGE-L": 0.45, "CIDEr": 0.831}


def png() -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def make_run(workdir, caption="a dog", split="test"):
    (workdir / "eval").mkdir(parents=True)
    (workdir / "vit").mkdir()
    source_map = [0, *[1 + i % 5 for i in range(16)]]
    examples = [
        {
            "id": "a",
            "references": ["a dog"],
            "caption": caption,
            "cider": 2.5,
            "image": png(),
            "source_map": source_map,
        },
        {"id": "b", "references": ["a cat", EVIL], "caption": "", "cider": 0.0},
    ]
    results = {
        "split": split,
        "step": 200,
        "num_examples": 2,
        "loss": 1.25,
        "scores": SCORES,
        "shuffled": {**SCORES, "CIDEr": 0.2},
        "exact_match": 0.5,
        "config": "",
        "examples": examples,
    }
    (workdir / "eval" / f"{split}.json").write_text(json.dumps(results))
    train = [
        {"step": s, "kind": "train", "loss": 5 / s, "lr": 1e-4, "images_per_second": 9.0} for s in range(10, 210, 10)
    ]
    val = [
        {"step": s, "kind": "eval", "split": "val", "loss": 2.0, "CIDEr": 0.4, "CIDEr_shuffled": 0.1}
        for s in (100, 200)
    ]
    lines = [json.dumps(record) for record in [*train, *val, {"step": 205, "kind": "train", "loss": float("nan")}]]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 210, "ki')
    vit = [{"step": 10, "kind": "train", "loss": 3.0}, {"step": 10, "kind": "eval", "R@1": 0.25, "R@5": 0.5}]
    (workdir / "vit" / "metrics.jsonl").write_text("\n".join(map(json.dumps, vit)))
    (workdir / "config.json").write_text(json.dumps({"data": {"name": "openmoji"}, "vit.size": "tiny", "seed": 1}))


class Page(HTMLParser):
    """Parses a page into tags with attributes and text; the page must be well nested."""

    VOID = frozenset(["meta", "img", "br", "link"])

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.texts, self._open = [], [], []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def test_report_shows_the_run(tmp_path):
    make_run(tmp_path / "run")
    path = write_report(tmp_path / "run")
    assert path == tmp_path / "run" / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    for words in ("83.1", "20.0", "4.2\u00d7", "50.0 %", "1.250", "16 patches → 6 tokens", "CC BY-SA 4.0", "vit.size"):
        assert words in page.text
    for title in ("Loss", "Validation CIDEr", "Retrieval on validation pictures, %", "Learning rate"):
        assert title in page.texts
    pictures = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) == 2  # the picture and its merge map
    for source in pictures:
        assert Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,")))).size[0] >= 16


def test_report_needs_nothing_from_outside(tmp_path):
    make_run(tmp_path / "run")
    html = write_report(tmp_path / "run").read_text(encoding="utf-8")
    page = Page(html)
    assert not [tag for tag, _ in page.tags if tag in ("link", "script", "iframe")]
    assert all(attrs["src"].startswith("data:") for _, attrs in page.tags if "src" in attrs)
    assert not re.search(r"@import|url\(", html)


@pytest.mark.parametrize("caption", [EVIL, "{{ 7 * 7 }} {% raw %}", "x" * 3000, "", "</style></td>"])
def test_captions_are_text_and_nothing_else(tmp_path, caption):
    make_run(tmp_path / "run", caption=caption)
    page = Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    assert not [tag for tag, attrs in page.tags if tag == "script" or "onerror" in attrs]
    assert " ".join(caption.split()) in page.text


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


def test_merge_map_tints_groups_and_outlines_them():
    image = np.full((8, 8, 3), 255, np.uint8)
    # 2 x 2 patches: the left column is one token, the right ones are alone; the class token is alone.
    drawing = np.asarray(merge_map(image, np.array([0, 1, 2, 1, 3]), size=200))
    assert drawing.shape == (200, 200, 3)
    top_left, bottom_left, top_right = drawing[50, 50], drawing[150, 50], drawing[50, 150]
    assert (top_left == bottom_left).all()
    assert (top_left != 255).any()
    assert (top_right == 255).all()
    assert (drawing[50, 99:102] < 100).all(-1).any()  # a line between the columns
    assert (drawing[100, 150] < 100).all()  # and between the right patches
    assert (drawing[100, 50] == top_left).all()  # but none inside the merged token


def test_merge_map_without_a_class_token_is_the_same():
    image = np.full((8, 8, 3), 255, np.uint8)
    with_it, without = (np.asarray(merge_map(image, np.array(x), size=200)) for x in ([9, 1, 2, 1, 3], [1, 2, 1, 3]))
    np.testing.assert_array_equal(with_it, without)


def test_merge_map_marks_the_class_token():
    image = np.full((8, 8, 3), 255, np.uint8)
    drawing = np.asarray(merge_map(image, np.array([0, 0, 1, 2, 3]), size=200))
    assert (drawing[50, 50] < 100).all()
    assert (drawing[50, 150] == 255).all()


@pytest.mark.parametrize("length", [0, 3, 18])
def test_merge_map_needs_a_square_of_patches(length):
    with pytest.raises(ValueError, match="square of patches"):
        merge_map(np.zeros((8, 8, 3), np.uint8), np.zeros(length, int))
