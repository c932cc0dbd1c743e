"""Runs that are killed. This is a file of its own, since it takes minutes and each file runs in one worker."""

import kill_series


def test_killed_run_is_bit_equal_to_an_undisturbed_one(tmp_path):
    """SIGKILL comes six times, at random moments; each time the run is resumed. `kill_series` can kill more often."""
    moments = kill_series.kill_training(tmp_path, kills=6, seed=3, steps=24)
    assert sum(moments.values()) == 6
    assert len(moments) > 1
