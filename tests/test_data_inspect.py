"""The verb that shows the data: what it prints, and its page."""

import base64
import io
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from simvlg_jax import inspect_data
from simvlg_jax.config.load import load_config
from simvlg_jax.data import page, statistics
from simvlg_jax.data.batch import BatchSpec, Pictures, TextSpec
from simvlg_jax.data.page import samples, write_page
from simvlg_jax.data.statistics import Picture, Statistics, describe, histogram
from simvlg_jax.data.text import IGNORE, CaptionText, character_tokenizer

TEXT = CaptionText(character_tokenizer(), start_id=1, end_id=2, pad_id=0, max_tokens=12, start_is_target=False)
SPEC = BatchSpec(Pictures(16), {"caption": TextSpec(12, predicted=True, load=lambda: TEXT)})


@pytest.mark.parametrize(("split", "records"), [("train", 64), ("val", 16)])
def test_inspect_prints_statistics_and_writes_a_page(split, records, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inspect_data, "build_task", lambda config: SimpleNamespace(batch=SPEC))
    monkeypatch.setattr(statistics, "SECONDS", 0)
    path = inspect_data.inspect(load_config("configs/tiny.py"), split, tmp_path)
    printed = capsys.readouterr().out
    assert f"synthetic, split {split}: {records} records" in printed
    # "a red circle" takes 14 tokens: start, 12 letters, end
    assert "longest 12; 100.0% fill the limit of 12" in printed
    assert ("pipeline: " in printed) == (split == "train")
    html = path.read_text()
    assert f"{records} of {records}" in html  # captions that fill the limit
    assert html.count("data:image/png;base64,") == 8  # the batch of configs/tiny.py


def batch(**arrays):
    ids = np.array([[1, 40, 41, 2, 0]], np.int32)
    given = {
        "image": np.full((1, 16, 16, 3), 7, np.uint8),
        "caption_ids": ids,
        "caption_mask": np.array([[1, 1, 1, 1, 0]], np.int32),
        "caption_targets": np.array([[IGNORE, IGNORE, 41, 2, IGNORE]], np.int32),
    }
    return given | arrays


def test_tokens_are_targets_inputs_or_padding():
    (sample,) = samples(batch(), SPEC)
    tokens = sample.texts["caption"]
    assert [token.kind for token in tokens] == ["input", "input", "target", "target", "padding"]
    tokenizer = TEXT.tokenizer
    assert [token.text for token in tokens] == [tokenizer.id_to_token(int(i)) for i in (1, 40, 41, 2, 0)]
    assert not sample.dead
    with Image.open(io.BytesIO(base64.b64decode(sample.frames[0]))) as picture:
        assert picture.size == (page.SHOWN, page.SHOWN)
        assert (np.asarray(picture) == 7).all()


def test_clips_show_their_frames_and_rows_of_weight_0_are_dead():
    clips = batch(image=np.zeros((1, 3, 16, 16, 3), np.uint8), weight=np.zeros(1, np.float32))
    (sample,) = samples(clips, SPEC)
    assert (len(sample.frames), sample.dead) == (3, True)


def test_the_page_escapes_what_the_data_say(tmp_path):
    found = Statistics(1, 1, [Picture("<b>", 1, 1, 1)], [1], 0, [3])
    found.dead["<script>x</script>"] += 1
    token = page.Token("<script>alert(1)</script>", 5, "target")
    write_page(tmp_path / "p.html", "<i>", found, 12, [page.Sample([], {"caption": [token]}, False)], None)
    html = (tmp_path / "p.html").read_text()
    assert "<script>" not in html and "<i>" not in html and "<b>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def png(width: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, 2)).save(out, "PNG")
    return out.getvalue()


def test_statistics_count_pictures_texts_and_dead_records():
    record = {"image": png(30), "caption": "ab", "references": ["ab", "c"], "id": "1"}
    source = [record, {**record, "image": b"no picture"}, {**record, "image": png(5), "question": "who?"}]
    found = describe(source, TEXT)
    assert (found.records, found.sampled, found.questions) == (3, 3, 1)
    assert [(p.format, p.width, p.height) for p in found.pictures] == [("PNG", 30, 2), ("PNG", 5, 2)]
    assert (found.references, found.tokens) == ([2, 2], [4, 4])
    assert found.dead.total() == 1


def test_a_sample_of_a_large_source_spans_it():
    source = [{"image": png(1 + i), "caption": "a", "references": ["a"], "id": str(i)} for i in range(50)]
    widths = [picture.width for picture in describe(source, TEXT, max_records=5).pictures]
    assert (widths[0], widths[-1], len(widths)) == (1, 50, 5)


@given(st.lists(st.integers(0, 5000), max_size=50), st.integers(1, 40))
def test_a_histogram_counts_every_value_in_its_bar(values, bars):
    counted = histogram(values, bars)
    assert sum(count for _, count in counted) == len(values)
    assert len(counted) <= bars
    for label, count in counted:
        first, _, last = label.partition("-")
        assert sum(int(first) <= value <= int(last or first) for value in values) == count
