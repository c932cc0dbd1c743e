"""The verb that shows the data: what it prints, and the contact sheet."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from simvlg_jax import inspect_data
from simvlg_jax.config.load import load_config
from simvlg_jax.data import statistics
from simvlg_jax.data.batch import BatchSpec, Pictures, TextSpec
from simvlg_jax.data.text import CaptionText, character_tokenizer

TEXT = CaptionText(character_tokenizer(), start_id=1, end_id=2, pad_id=0, max_tokens=12, start_is_target=False)
SPEC = BatchSpec(Pictures(16), {"caption": TextSpec(12, predicted=True, load=lambda: TEXT)})


@pytest.mark.parametrize(("split", "records"), [("train", 64), ("val", 16)])
def test_inspect_prints_statistics_and_draws_a_batch(split, records, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inspect_data, "build_task", lambda config: SimpleNamespace(batch=SPEC))
    monkeypatch.setattr(statistics, "SECONDS", 0)
    path = inspect_data.inspect(load_config("configs/tiny.py"), split, tmp_path)
    printed = capsys.readouterr().out
    assert f"synthetic, split {split}: {records} records" in printed
    # "a red circle" takes 14 tokens: start, 12 letters, end
    assert "longest 12; 100.0% fill the limit of 12" in printed
    assert ("pipeline: " in printed) == (split == "train")
    with Image.open(path) as sheet:
        assert sheet.size == (statistics.COLUMNS * statistics.TILE, statistics.TILE + 3 * statistics.LINE)
        pictures = np.asarray(sheet)[: statistics.TILE]
    for column in np.split(pictures, statistics.COLUMNS, axis=1):
        assert len(np.unique(column.reshape(-1, 3), axis=0)) > 1  # a shape on white
