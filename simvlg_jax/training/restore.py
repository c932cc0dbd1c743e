"""Restores a trained run or an exported model for evaluation, captioning and export."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simvlg_jax.convert import own_files
from simvlg_jax.parallel import lazy
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.tasks import build_task
from simvlg_jax.tasks import params as partition
from simvlg_jax.tasks.build import check_shapes
from simvlg_jax.tasks.task import Task
from simvlg_jax.training.checkpoint import Checkpoints
from simvlg_jax.training.frozen import check_frozen, describe_frozen
from simvlg_jax.training.plan import Plan
from simvlg_jax.utils.errors import UserError

WEIGHTS = "weights.safetensors"  # of an exported model, next to its config.json


@dataclass(frozen=True)
class Run:
    """A model after `step` training steps. Its parameters, trained and frozen in one tree, are read on first use.

    Attributes:
      config: that the task was built from.
    """

    config: ConfigDict
    task: Task
    mesh: Mesh
    step: int
    read: Callable[[], dict]

    @cached_property
    def params(self) -> dict:
        """Sharded parameters. Raises UserError if the weights or the checkpoint cannot be used."""
        return self.read()


def restore_run(config: ConfigDict, workdir: Path, which: str = "best", captions: bool = False) -> Run:
    """Returns a checkpoint of a workdir, or an exported model.

    Args:
      which: "best", "latest" or a step.
      captions: the model must be able to write captions.

    Raises:
      UserError: there is no such checkpoint, or the model writes no captions. Reading the parameters raises it if the
        checkpoint is damaged or the frozen weights differ from those of the training.
    """
    exported = (workdir / WEIGHTS).exists()
    if exported:
        config = config.copy_and_resolve_references()
        with config.unlocked():
            config.vit.weights = config.connector.weights = config.train.init_from = ""  # the file holds all of them
            config.vit.scan = True
    task, mesh = build_task(config), meshes.make_mesh(config.mesh)
    if captions and not task.captions:
        raise UserError(f"{workdir} holds a run of the {config.task} task, whose model writes no captions")
    if exported:
        if which not in ("best", "latest"):
            raise UserError(f"{workdir} is an exported model of one checkpoint: omit --checkpoint {which}", 2)
        path = workdir / WEIGHTS
        step = int(own_files.read_metadata(path).get("step", 0))
        return Run(config, task, mesh, step, lambda: read_export(task, config, mesh, path))
    with contextlib.closing(Checkpoints(workdir, best_by=config.train.best_by, read_only=True)) as checkpoints:
        step = checkpoints.choose(which)

    def read() -> dict:
        trained, frozen = Plan(task, config, mesh).init_params()
        check_frozen(workdir, describe_frozen(frozen, task.sources))
        with contextlib.closing(Checkpoints(workdir, best_by=config.train.best_by, read_only=True)) as checkpoints:
            return partition.join(frozen, checkpoints.restore_params(step, trained))

    return Run(config, task, mesh, step, read)


def assemble(config: ConfigDict) -> Run:
    """Returns a model from the weights that its config names. Parts without weights are initialised at random."""
    task, mesh = build_task(config), meshes.make_mesh(config.mesh)
    return Run(config, task, mesh, 0, lambda: partition.join(*Plan(task, config, mesh).init_params()))


def read_export(task: Task, config: ConfigDict, mesh: Mesh, path: Path) -> dict:
    """Returns all parameters: those of the exported file, and the others from the weights that the config names.

    Raises:
      UserError: the file is damaged or has another architecture.
    """
    boxed = jax.eval_shape(task.init, jax.random.key(config.seed))
    abstract = nn.unbox(boxed)
    loaded = {**task.load_pretrained(abstract), **traverse_util.unflatten_dict(own_files.read_flat(path), sep="/")}
    check_shapes({name: loaded.get(name, {}) for name in {**abstract, **loaded}}, abstract)
    dtype = jnp.dtype(config.frozen_dtype)
    shardings = meshes.param_shardings(boxed, mesh)
    return jax.tree.map(lambda x, s: lazy.put(x.astype(dtype), s), loaded, shardings)
