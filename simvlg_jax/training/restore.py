"""Restores a trained run or an exported model for evaluation, captioning and export."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simvlg_jax.convert import own_files
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.tasks import build_task
from simvlg_jax.tasks import params as partition
from simvlg_jax.tasks.build import check_shapes
from simvlg_jax.tasks.task import Task
from simvlg_jax.training import storage
from simvlg_jax.training.frozen import check_frozen, describe_frozen
from simvlg_jax.training.plan import Plan
from simvlg_jax.utils.errors import UserError

WEIGHTS = "weights.safetensors"  # of an exported model, next to its config.json


@dataclass(frozen=True)
class Run:
    """A model after `step` training steps. Its parameters, trained and frozen in one tree, are read on first use.

    Attributes:
      config: that the task was built from.
      averaged: the steps of the checkpoints whose mean it is; empty if it is one alone.
      shapes: returns a ShapeDtypeStruct of each parameter, with its sharding.
    """

    config: ConfigDict
    task: Task
    mesh: Mesh
    step: int
    shapes: Callable[[], dict]
    read: Callable[[], dict]
    averaged: tuple[int, ...] = ()

    @property
    def origin(self) -> dict:
        """Which checkpoint it is, or which ones it is the mean of, for files of results."""
        return {"step": self.step} | ({"averaged": list(self.averaged)} if self.averaged else {})

    @functools.cached_property
    def params(self) -> dict:
        """Sharded parameters. Raises UserError if the weights or the checkpoint cannot be used."""
        return self.read()


def restore_run(
    config: ConfigDict, workdir: Path, which: str = "best", captions: bool = False, unquantized: bool = False
) -> Run:
    """Returns a checkpoint of a workdir, or an exported model.

    Args:
      which: "best", "latest", a step, or several with commas between them. Of several the trained parameters are the
        mean of theirs, and the step is the last.
      captions: the model must be able to write captions.
      unquantized: read frozen weights that the run has as int8 as the floats that they were made of, for export.

    Raises:
      UserError: there is no such checkpoint, or the model writes no captions. Reading the parameters raises it if the
        checkpoint is damaged or the frozen weights differ from those of the training.
    """
    exported, config = (workdir / WEIGHTS).exists(), _without_pformer(config)
    floats = _with_floats(config) if unquantized and config.frozen_dtype == "int8" else None
    if exported:
        config = (floats or config).copy_and_resolve_references()
        with config.unlocked():
            config.vit.weights = config.connector.weights = config.train.init_from = ""  # the file holds all of them
            config.connector.position_norm = 0.0
            config.vit.scan = True
    task, mesh = build_task(config), meshes.make_mesh(config.mesh)
    if captions and not task.captions:
        raise UserError(f"{workdir} holds a run of the {config.task} task, whose model writes no captions")
    if exported:
        if which not in ("best", "latest"):
            raise UserError(f"{workdir} is an exported model of one checkpoint: omit --checkpoint {which}", 2)
        path = workdir / WEIGHTS
        step = int(own_files.read_metadata(path).get("step", 0))
        shapes = functools.cache(lambda: _exported_shapes(task, config, mesh))
        return Run(config, task, mesh, step, shapes, lambda: read_export(task, shapes(), path))
    from simvlg_jax.training.checkpoint import Checkpoints  # here, since exported models do not need Orbax

    with contextlib.closing(Checkpoints(workdir, best_by=config.train.best_by, read_only=True)) as checkpoints:
        steps = checkpoints.choose(which)

    plan = functools.cache(lambda: Plan(task, config, mesh))

    def read() -> dict:
        trained, frozen = plan().init_params()
        check_frozen(workdir, describe_frozen(frozen, task.sources))
        if floats:
            frozen = Plan(task, floats, mesh).init_params()[1]
        with contextlib.closing(Checkpoints(workdir, best_by=config.train.best_by, read_only=True)) as checkpoints:
            return partition.join(frozen, _mean(lambda step: checkpoints.restore_params(step, trained), steps))

    averaged = steps if len(steps) > 1 else ()
    return Run(config, task, mesh, steps[-1], lambda: plan().shapes, read, averaged)


def _mean(restore: Callable[[int], dict], steps: Sequence[int]) -> dict:
    """Returns the mean of the trees that `restore` gives for the steps, which are in memory one after the other."""
    total = restore(steps[0])
    for step in steps[1:]:
        total = jax.tree.map(jnp.add, total, restore(step))
    return jax.tree.map(lambda x: x / len(steps), total) if len(steps) > 1 else total


def _without_pformer(config: ConfigDict) -> ConfigDict:
    """Returns the config of a captioner without the P-Former, which is for training alone."""
    if not (config.task == "caption" and config.train.align):
        return config
    copy = config.copy_and_resolve_references()
    with copy.unlocked():
        copy.train.align = 0.0
    return copy


def _with_floats(config: ConfigDict) -> ConfigDict:
    """Returns the config with frozen weights in the dtype that an int8 model has for those that are no matrices."""
    copy = config.copy_and_resolve_references()
    with copy.unlocked():
        copy.frozen_dtype, copy.frozen_compute = storage.float_dtype(config).name, ""
    return copy


def assemble(config: ConfigDict) -> Run:
    """Returns a model from the weights that its config names. Parts without weights are initialised at random."""
    task, mesh = build_task(config), meshes.make_mesh(config.mesh)
    plan = functools.cache(lambda: Plan(task, config, mesh))

    def read() -> dict:
        return partition.join(*plan().init_params())

    return Run(config, task, mesh, 0, lambda: plan().shapes, read)


def read_export(task: Task, shapes: dict, path: Path) -> dict:
    """Returns all parameters: those of the exported file, and the others from the weights that the config names.

    Args:
      shapes: see `Run`.

    Raises:
      UserError: the file is damaged or has another architecture.
    """
    loaded = {**task.load_pretrained(shapes), **traverse_util.unflatten_dict(own_files.read_flat(path), sep="/")}
    check_shapes({name: loaded.get(name, {}) for name in {**shapes, **loaded}}, shapes)
    return jax.tree.map(storage.put, loaded, shapes, is_leaf=lambda x: not isinstance(x, dict))


def _exported_shapes(task: Task, config: ConfigDict, mesh: Mesh) -> dict:
    boxed = jax.eval_shape(task.init, jax.random.key(config.seed))
    return storage.stored(boxed, task, config, mesh, storage.float_dtype(config))
