"""A bfloat16 training step of every kind of model stays near the float32 one.

The loss is within 0.1 %, the cosine of the gradients above 0.995, and their length within 5 %. One rounding is off
by up to 0.4 %.
"""

import jax
import numpy as np
import optax
import pytest

from simvlg_jax.config.load import load_config
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.tasks import build_task
from simvlg_jax.training.plan import Plan

MODELS = {
    "llama, everything trained": ["vit.train=True", "llm.train=True"],
    "opt": ["llm.size=opt_tiny", "llm.start_is_target=True"],
    "qwen2.5": ["llm.size=qwen2.5_tiny"],
    "qwen3": ["llm.size=qwen3_tiny"],
    "contrast beside captions": ["train.beta=0.5"],
    "contrastive": ["task=contrastive"],
}


def first_step(*overrides):
    """(loss, flat gradient) of the first step on drawn pictures and random texts."""
    flags = ["mesh.data=1", "connector.dropout=0.0", "train.batch_size=16", *overrides]
    config = load_config("configs/tiny.py", [f"--config.{flag}" for flag in flags])
    mesh = meshes.make_mesh(config.mesh)
    plan = Plan(build_task(config), config, mesh)
    rng = np.random.default_rng(0)
    batch = {}
    for name, (shape, dtype) in plan.task.batch.shapes(16, lengths=12).items():
        high = {"image": 256, "mask": 2, "weight": 2}.get(name.rpartition("_")[2], 98)
        batch[name] = rng.integers(0 if high == 256 else 1, high, shape).astype(dtype)
    params, frozen = plan.init_params()
    state, metrics = plan.step(plan.init_state(params), frozen, meshes.put_batch(batch, mesh))
    moments = jax.tree.leaves(jax.device_get(optax.tree.get(state.opt_state, "mu")))
    return float(metrics["loss"]), np.concatenate([x.ravel() for x in moments])


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_bfloat16_step_stays_near_the_float32_one(overrides):
    loss, gradient = first_step(*overrides)
    low_loss, low_gradient = first_step(*overrides, "dtype=bfloat16", "frozen_dtype=bfloat16")
    cosine = gradient @ low_gradient / np.linalg.norm(gradient) / np.linalg.norm(low_gradient)
    assert low_loss == pytest.approx(loss, rel=1e-3) and low_loss != loss
    assert cosine > 0.995
    assert np.linalg.norm(low_gradient) == pytest.approx(np.linalg.norm(gradient), rel=0.05)
