"""What is measured: a config's model, optimizer state and batches, on this process's devices."""

import math
import time
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simvlg_jax.data.mixture import load_training
from simvlg_jax.data.skipped import Skipped
from simvlg_jax.data.timings import Timings
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.tasks import build_task
from simvlg_jax.tasks.task import Task
from simvlg_jax.training.plan import Plan
from simvlg_jax.training.step import TrainState
from simvlg_jax.training.trainer import make_iterator, plan_packing
from simvlg_jax.utils.errors import UserError


@dataclass
class Setting:
    """What is measured.

    Attributes:
      state, frozen: the parameters, sharded. A step of the plan takes the memory of the state, so it is replaced.
      batches: on the host, as training draws them.
      input_seconds: how long one thread takes to make a batch: read, decode, tokenise, collate.
    """

    config: ConfigDict
    task: Task
    mesh: Mesh
    plan: Plan
    state: TrainState
    frozen: dict
    batches: list[dict[str, np.ndarray]]
    input_seconds: float

    @property
    def host_batch(self) -> dict[str, np.ndarray]:
        """The batch that is measured: the one whose captions have the median number of places."""
        return sorted(self.batches, key=lambda batch: batch["caption_ids"].size)[len(self.batches) // 2]

    @property
    def images(self) -> int:
        return self.config.train.batch_size


def prepare(config: ConfigDict, batches: int) -> Setting:
    """Builds the model and draws at least so many batches.

    Raises:
      UserError: the task has no captions or writes them itself, runs the language model twice, or data, weights or mesh
        cannot be used.
    """
    task = build_task(config)
    if not task.captions or task.batch.beams:
        raise UserError(
            f"the task {config.task!r} trains no captioner on the captions of the data, whose step is measured here: "
            "name a config of the task 'caption', such as configs/tiny.py",
            2,
        )
    if config.train.unguessed:
        raise UserError("the parts are of a step that runs the language model once: set --config.train.unguessed=0", 2)
    mesh = meshes.make_mesh(config.mesh)
    plan = Plan(task, config, mesh)
    drawn, seconds = draw(config, task, mesh, batches)  # before the weights, which may take minutes
    params, frozen = plan.init_params()
    return Setting(config, plan.tasks[-1], mesh, plan, plan.init_state(params), frozen, drawn, seconds)


def draw(config: ConfigDict, task: Task, mesh: Mesh, count: int) -> tuple[list[dict[str, np.ndarray]], float]:
    """Returns batches, and the seconds that one thread takes for each.

    Whole windows are drawn if captions are packed, since the batches of a window are made together. The first window
    does not count: it opens files.
    """
    alone = config.copy_and_resolve_references()
    with alone.unlocked():
        alone.data.workers = alone.data.read_threads = 0  # nothing is read ahead
        alone.train.overfit_one_batch = False
    source = load_training(config.data)
    packing = plan_packing(config, task, mesh, source)
    iterator, window = make_iterator(alone, task, mesh, source, packing, Skipped(), Timings()), 1
    if packing:
        window = packing.window
    first = [next(iterator) for _ in range(window)]
    start, number = time.perf_counter(), window * math.ceil(count / window)
    rest = [next(iterator) for _ in range(number)]
    return first + rest, (time.perf_counter() - start) / number


def padding_share(batches: list[dict[str, np.ndarray]], prefix: int) -> float:
    """Returns which share of the language model's tokens is padding, with `prefix` soft prompt tokens per picture."""
    places = sum(batch["caption_mask"].size + prefix * len(batch["weight"]) for batch in batches)
    return sum(int((batch["caption_mask"] == 0).sum()) for batch in batches) / places


def put(setting: Setting) -> dict[str, jax.Array]:
    """Returns the measured batch on the devices."""
    return meshes.put_batch(setting.host_batch, setting.mesh)
