"""Schedules and decay against the published formulas, computed here by hand."""

import math

import jax
import pytest

from simvlg_jax.config.load import load_config
from simvlg_jax.training.optimizer import decay_mask, learning_rate


def optimizer(**fields):
    values = {"lr": 1e-4, "min_lr": 1e-5, "warmup_lr": 1e-6, "warmup_steps": 50, "inner_epoch_steps": 100, **fields}
    return load_config("configs/tiny.py", [f"--config.optimizer.{k}={v}" for k, v in values.items()]).optimizer


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1e-6),
        (25, 1e-6 + (1e-4 - 1e-6) * 25 / 50),
        (50, 1e-4),
        (99, 1e-4),  # warm-up is over, and the cosine has not moved yet
        (100, 1e-5 + 0.5 * 9e-5 * (1 + math.cos(math.pi * 1 / 10))),
        (199, 1e-5 + 0.5 * 9e-5 * (1 + math.cos(math.pi * 1 / 10))),
        (999, 1e-5 + 0.5 * 9e-5 * (1 + math.cos(math.pi * 9 / 10))),
    ],
)
def test_staircase_is_the_published_schedule(step, expected):
    assert float(learning_rate(optimizer(schedule="staircase"), 1000)(step)) == pytest.approx(expected, rel=1e-5)


def test_staircase_cuts_a_warm_up_longer_than_the_inner_epoch():
    schedule = learning_rate(optimizer(schedule="staircase", warmup_steps=1000), 1000)
    assert float(schedule(99)) < 2e-5
    assert float(schedule(100)) > 9e-5


@pytest.mark.parametrize(("step", "expected"), [(0, 1e-6), (50, 1e-4), (525, 5.5e-5), (1000, 1e-5)])
def test_cosine_is_smooth_to_the_last_step(step, expected):
    assert float(learning_rate(optimizer(), 1000)(step)) == pytest.approx(expected, rel=1e-5)


def test_decay_spares_biases_scales_and_the_temperature_but_not_tables():
    names = ["connector/layer_0/query/kernel", "connector/layer_0/query/bias", "ln_vision/scale", "ln_vision/bias"]
    names += ["connector/embeddings/position", "connector/embeddings/token_type", "log_temperature"]
    tree = {}
    for name in names:
        node = tree
        *parents, leaf = name.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = 0
    decayed = [name for name, flag in zip(sorted(names), jax.tree.leaves(decay_mask(tree)), strict=True) if flag]
    assert decayed == [
        "connector/embeddings/position",
        "connector/embeddings/token_type",
        "connector/layer_0/query/kernel",
    ]
