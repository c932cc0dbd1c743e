"""A short series of kills; `python tests/kill_series.py` runs longer ones by hand."""

import kill_series


def test_killed_training_is_bit_equal_to_an_undisturbed_one(tmp_path):
    """Ten times SIGKILL at random moments of runs with two data workers, resumed each time."""
    moments = kill_series.kill_training(tmp_path, kills=10, workers=2, seed=3, steps=24)
    assert sum(moments.values()) == 10
    assert len(moments) > 1
