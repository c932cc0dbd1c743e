"""Retrieval scores have the values that are computed by hand."""

import numpy as np
import pytest
from preparing import run, write_json

from simvlg_jax.config.load import load_config
from simvlg_jax.evaluation.evaluators import make_evaluator
from simvlg_jax.evaluation.retrieval import recall
from simvlg_jax.parallel.mesh import make_mesh
from simvlg_jax.tasks import build_task
from simvlg_jax.utils.errors import UserError


def test_records_without_a_caption_are_refused(tmp_path):
    """All of their sentences are equal, and ties count as found."""
    rows = [{"image": "0.png", "caption": "a"}, {"image": "1.png"}]
    run(tmp_path / "data", write_json(tmp_path / "list", rows, 2), split="val", unlabelled=True)
    flags = ["data.name=prepared", f"data.path={tmp_path / 'data'}"]
    config = load_config("configs/tiny.py:vit", [f"--config.{flag}" for flag in flags])
    with pytest.raises(UserError, match=r"evals\.val: a record of this split has no caption"):
        make_evaluator("val", config.evals.val, build_task(config), config, make_mesh(config.mesh))


def test_recall_counts_rows_whose_own_column_is_among_the_nearest():
    similarity = np.array(
        [
            [0.9, 0.1, 0.2, 0.3],  # nearest
            [0.8, 0.5, 0.1, 0.0],  # second
            [0.7, 0.6, 0.4, 0.5],  # last
            [0.1, 0.2, 0.3, 0.3],  # tied with another for the first place
        ]
    )
    assert recall(similarity, (1, 2, 3, 4)) == {"R@1": 0.5, "R@2": 0.75, "R@3": 0.75, "R@4": 1.0}
