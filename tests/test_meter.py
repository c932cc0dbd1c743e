"""The numbers of a log line: what was skipped, by reason, and how long examples took."""

import jax.numpy as jnp
import pytest

from simvlg_jax.data.skipped import Skip, Skipped
from simvlg_jax.data.timings import Timings
from simvlg_jax.training.meter import Meter


def line(skipped, timings):
    meter = Meter()
    for step in (1, 2):
        metrics = {"loss": 0.5 + step, "reward": 1.0 + step, "lr": step / 4, "grad_norm": 0.1 * step}
        meter.add(step, {name: jnp.float32(value) for name, value in metrics.items()}, images=8, flops=100)
    return meter.read(skipped, timings)


def test_skipped_records_are_logged_by_reason_and_in_total(capsys):
    skipped = Skipped()
    skips = [Skip("truncated", "OSError", record, "") for record in range(5)] + [Skip("too large", "bomb", 7, "coco")]
    skipped.add(skips, 64, lambda skip: f"record {skip.record}")
    values = line(skipped, Timings())
    assert {name: value for name, value in values.items() if name.startswith("skipped/")} == {
        "skipped/truncated": 5,
        "skipped/too large": 1,
    }
    assert values["unreadable"] == 6 and values["loss"] == 2 and values["lr"] == 0.5
    assert values["reward"] == 2.5 and values["grad_norm"] == pytest.approx(0.2)
    said = capsys.readouterr().err
    assert "skipped record 7: too large (bomb)" in said and said.count("truncated") == 3


def test_nothing_is_logged_where_nothing_was_skipped_or_read():
    values = line(Skipped(), Timings())
    absent = {"unreadable", "read_ms", "decode_ms", "queue_depth"}
    assert not [name for name in values if name.startswith("skipped") or name in absent]


def test_times_are_means_since_the_last_line():
    timings = Timings()
    timings.add(examples=8, read=0.016, decode=0.08)
    timings.add(examples=8, read=0.0, decode=0.08)
    values = line(Skipped(), timings)
    assert (values["read_ms"], values["decode_ms"]) == (pytest.approx(1), pytest.approx(10))
    assert "read_ms" not in line(Skipped(), timings)


def test_queue_depth_is_the_mean_over_the_draws_since_the_last_line():
    timings = Timings()
    for asked, made in ((1, 5), (6, 2), (7, 3), (8, 7.5)):  # ready at none of the draws, at one, at two, at the last
        timings.draw(asked, made)
    assert line(Skipped(), timings)["queue_depth"] == (0 + 1 + 2 + 1) / 4
    assert "queue_depth" not in line(Skipped(), timings)
