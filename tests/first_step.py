"""The first step of a config, from given parameters where several configs are compared."""

from collections.abc import Callable

import jax
import optax
from ml_collections import ConfigDict

from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.tasks import build_task
from simvlg_jax.tasks.task import Task
from simvlg_jax.training.plan import Plan


def first_step(config: ConfigDict, batch: Callable[[Task], dict], params: tuple[dict, dict] | None = None):
    """Takes one step.

    Args:
      batch: task -> arrays of a batch.
      params: (trained, frozen) host arrays, cast and sharded as the config says. None initialises them, which takes
        longer to compile than the step.

    Returns:
      (loss, AdamW's first moments as host arrays, the parameters before the step as host arrays).
    """
    mesh = meshes.make_mesh(config.mesh)
    plan = Plan(build_task(config), config, mesh)
    if params is None:
        trained, frozen = plan.init_params()
    else:
        state, shapes = plan.abstract
        trained, frozen = jax.tree.map(
            lambda x, shape: jax.device_put(x.astype(shape.dtype), shape.sharding), params, (state.params, shapes)
        )
    before = jax.device_get((trained, frozen))
    state, metrics = plan.step(plan.init_state(trained), frozen, meshes.put_batch(batch(plan.task), mesh))
    return float(metrics["loss"]), jax.device_get(optax.tree.get(state.opt_state, "mu")), before
