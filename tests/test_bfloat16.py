"""A bfloat16 training step of every kind of model stays near the float32 one.

The loss is within 0.1 %, the cosine of the gradients above 0.995, and their length within 5 %. One rounding is off
by up to 0.4 %.
"""

import jax
import numpy as np
import pytest
from first_step import first_step

from simvlg_jax.config.load import load_config

MODELS = {
    "llama, everything trained": ["vit.train=True", "llm.train=True"],
    "opt": ["llm.size=opt_tiny", "llm.start_is_target=True"],
    "qwen2.5": ["llm.size=qwen2.5_tiny"],
    "qwen3": ["llm.size=qwen3_tiny"],
    "contrast beside captions": ["train.beta=0.5"],
    "contrastive": ["task=contrastive"],
}


def random_batch(task):
    """Returns random pictures and texts."""
    rng = np.random.default_rng(0)
    batch = {}
    for name, (shape, dtype) in task.batch.shapes(16, lengths=12).items():
        high = {"image": 256, "mask": 2, "weight": 2}.get(name.rpartition("_")[2], 98)
        batch[name] = rng.integers(0 if high == 256 else 1, high, shape).astype(dtype)
    return batch


def flat_step(*overrides, params=None):
    """Returns loss, flat gradient and the parameters before the first step on `random_batch`."""
    flags = ["mesh.data=1", "connector.dropout=0.0", "train.batch_size=16", *overrides]
    config = load_config("configs/tiny.py", [f"--config.{flag}" for flag in flags])
    loss, moments, params = first_step(config, random_batch, params)
    return loss, np.concatenate([x.ravel() for x in jax.tree.leaves(moments)]), params


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_bfloat16_step_stays_near_the_float32_one(overrides):
    loss, gradient, params = flat_step(*overrides)
    low_loss, low_gradient, _ = flat_step(*overrides, "dtype=bfloat16", "frozen_dtype=bfloat16", params=params)
    cosine = gradient @ low_gradient / np.linalg.norm(gradient) / np.linalg.norm(low_gradient)
    assert low_loss == pytest.approx(loss, rel=1e-3) and low_loss != loss
    assert cosine > 0.995
    assert np.linalg.norm(low_gradient) == pytest.approx(np.linalg.norm(gradient), rel=0.05)
