"""Retrieval scores have the values that are computed by hand."""

import numpy as np

from simvlg_jax.evaluation.retrieval import recall


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
