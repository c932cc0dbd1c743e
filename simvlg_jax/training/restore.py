"""A trained run, put back together for evaluating, captioning and exporting."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simvlg_jax.errors import UserError
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.training import step as steps
from simvlg_jax.training.checkpoint import Checkpoints, check_frozen
from simvlg_jax.training.tasks import Task, build_task


class Run(NamedTuple):
    """A task with its parameters (trained and frozen in one tree) as they were after `step` steps."""

    task: Task
    params: dict
    mesh: Mesh
    step: int


def restore_run(config: ConfigDict, workdir: Path, which: str = "best") -> Run:
    """Reads the "best" or "latest" checkpoint of a workdir, in the config's precision and placements.

    Raises:
      UserError: no checkpoint, or other frozen weights than the run was trained with.
    """
    mesh = meshes.make_mesh(config.mesh)
    task = build_task(config)
    checkpoints = Checkpoints(workdir, read_only=True)
    found = checkpoints.best() if which == "best" else checkpoints.latest()
    if found is None:
        raise UserError(f"{workdir} holds no checkpoint yet; train with simvlg_jax.train first")
    trained, frozen = steps.init_params(task, mesh, jax.random.key(config.seed), jnp.dtype(config.frozen_dtype))
    check_frozen(workdir, frozen, task.sources)
    params = {**frozen, **checkpoints.restore_params(found, trained)}
    checkpoints.close()
    return Run(task, params, mesh, found)
