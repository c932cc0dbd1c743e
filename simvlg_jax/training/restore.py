"""A trained run or exported model, put back together for evaluating, captioning and exporting."""

import contextlib
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simvlg_jax.convert import own_files
from simvlg_jax.parallel import lazy
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.tasks import params as partition
from simvlg_jax.tasks.task import Task, build_task, check_shapes
from simvlg_jax.training import step as steps
from simvlg_jax.training.checkpoint import Checkpoints
from simvlg_jax.training.frozen import check_frozen, describe_frozen
from simvlg_jax.utils.errors import UserError

WEIGHTS = "weights.safetensors"  # of an exported model, beside its config.json


class Run(NamedTuple):
    """A task with its parameters (trained and frozen in one tree) as they were after `step` steps."""

    task: Task
    params: dict
    mesh: Mesh
    step: int


def restore_run(config: ConfigDict, workdir: Path, which: str = "best") -> Run:
    """Reads a checkpoint of a workdir ("best", "latest" or a step), or an exported model, in the config's placements.

    Raises:
      UserError: no such checkpoint, a damaged one, or other frozen weights than the run was trained with.
    """
    if (workdir / WEIGHTS).exists():
        if which not in ("best", "latest"):
            raise UserError(f"{workdir} is an exported model of one checkpoint: leave out --checkpoint {which}", 2)
        return read_export(config, workdir / WEIGHTS)
    with contextlib.closing(Checkpoints(workdir, read_only=True)) as checkpoints:
        found = checkpoints.choose(which)
        mesh = meshes.make_mesh(config.mesh)
        task = build_task(config)
        trained, frozen = steps.init_params(task, config, mesh)
        check_frozen(workdir, describe_frozen(frozen, task.sources))
        params = partition.join(frozen, checkpoints.restore_params(found, trained))
    return Run(task, params, mesh, found)


def assemble(config: ConfigDict) -> Run:
    """A model from the weights that its config names, untrained here; what has no weights is random."""
    mesh = meshes.make_mesh(config.mesh)
    task = build_task(config)
    return Run(task, partition.join(*steps.init_params(task, config, mesh)), mesh, 0)


def read_export(config: ConfigDict, path: Path) -> Run:
    """An exported model: the weights in the file, and those its config names for the rest.

    Raises:
      UserError: a file that is damaged or of another architecture.
    """
    with config.unlocked():
        config.vit.weights = config.connector.weights = config.train.init_from = ""  # all in the file
        config.vit.scan = True
    mesh = meshes.make_mesh(config.mesh)
    task = build_task(config)
    boxed = jax.eval_shape(task.init, jax.random.key(config.seed))
    abstract = nn.unbox(boxed)
    loaded = {**task.load_pretrained(abstract), **traverse_util.unflatten_dict(own_files.read_flat(path), sep="/")}
    check_shapes({name: loaded.get(name, {}) for name in {**abstract, **loaded}}, abstract)
    dtype = jnp.dtype(config.frozen_dtype)
    shardings = meshes.param_shardings(boxed, mesh)
    params = jax.tree.map(lambda x, s: lazy.put(x.astype(dtype), s), loaded, shardings)
    return Run(task, params, mesh, int(own_files.read_metadata(path).get("step", 0)))
