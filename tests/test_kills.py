"""Runs that are killed; a file of its own, since it takes minutes and the suite is shared out by files."""

import kill_series


def test_killed_run_is_bit_equal_to_an_undisturbed_one(tmp_path):
    """Ten times SIGKILL at random moments, resumed each time; `kill_series` runs longer ones by hand."""
    moments = kill_series.kill_training(tmp_path, kills=10, seed=3, steps=24)
    assert sum(moments.values()) == 10
    assert len(moments) > 1
