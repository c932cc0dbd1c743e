"""What a run needs on its devices: parameters, optimizer state, data, evaluators and the compiled step."""

import contextlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simvlg_jax.data import packing, pipeline, workers
from simvlg_jax.data.mixture import load_training, parts_of
from simvlg_jax.data.skipped import Skipped
from simvlg_jax.data.sources import Source
from simvlg_jax.data.timings import Timings
from simvlg_jax.evaluation.evaluators import make_evaluators
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.tasks import build_task
from simvlg_jax.tasks import params as partition
from simvlg_jax.tasks.task import Task
from simvlg_jax.training import elastic
from simvlg_jax.training.checkpoint import Checkpoints
from simvlg_jax.training.flops import count_flops
from simvlg_jax.training.frozen import check_frozen, describe_frozen
from simvlg_jax.training.plan import Plan
from simvlg_jax.training.rollout import Rollout
from simvlg_jax.training.step import TrainState
from simvlg_jax.utils.errors import UserError
from simvlg_jax.utils.progress import SILENT, Announcer


class Program(NamedTuple):
    """A step compiled for one batch shape: run(state, frozen, batch), and its FLOPs over all devices."""

    run: Callable
    flops: int


class Trainer:
    """Everything that a run needs, sharded on the devices. It is created once, before the first step.

    Attributes:
      task, mesh, plan: see their modules.
      evaluators: the evaluators that run during training.
      frozen: the frozen parameters.
      frozen_entries: their entries in frozen.json.
      state: the TrainState, restored from the newest whole checkpoint if there is one.
      step: its number of steps, on the host.
      packing: how captions are packed; None if they are padded.
      iterator: the iterator over training batches, at the position of the checkpoint.
      skipped, timings: what this process received from it.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        checkpoints: Checkpoints | None = None,
        announce: Announcer = SILENT,
    ):
        self.config = config
        self.mesh = meshes.make_mesh(config.mesh)
        self.task = build_task(config)
        self.plan = Plan(self.task, config, self.mesh)
        self.skipped, self.timings = Skipped(), Timings()
        # The data come first, so that their errors appear before the weights are read, which may take minutes.
        source = load_training(config.data)
        self.packing = plan_packing(config, self.task, self.mesh, source)
        self.iterator = make_iterator(config, self.task, self.mesh, source, self.packing, self.skipped, self.timings)
        self.evaluators = make_evaluators(self.task, config, self.mesh)
        self._announce = announce
        self._rollout = None
        if self.task.batch.beams:
            with announce.first("counting the words of the training captions"):
                self._rollout = Rollout(self.plan.tasks, config, self.mesh, source)
        self._programs: dict[tuple[int, frozenset], Program] = {}  # by the place in `plan.steps` and the shapes
        loaded = self.task.load_pretrained(self.plan.shapes)
        with self._compiling():
            with announce.first("reading and initialising the weights"):
                params, self.frozen = self.plan.init_params(loaded)
                self.frozen_entries = describe_frozen(self.frozen, self.task.sources)
                self.state = self.plan.init_state(params)
            if checkpoints and checkpoints.steps():
                check_frozen(workdir, self.frozen_entries)
            restored = checkpoints.restore_newest(self.state) if checkpoints else None
            if restored is not None:
                self.state = restored.state
                self.move_to(restored.position)
        self.step = int(self.state.step)

    @property
    def params(self) -> dict:
        """All parameters that are evaluated."""
        return partition.join(self.frozen, self.state.final)

    @property
    def position(self) -> dict:
        """The position of the data: the number of batches drawn. It is valid for any number of processes."""
        return {"window": self.packing.window if self.packing else 1, "iterator": self.iterator.get_state()}

    def move_to(self, position: dict) -> None:
        """Moves the data iterator to `position`.

        Raises:
          UserError: an older version wrote the checkpoint and grouped captions by length, which this one does not.
        """
        if position["window"] != self.position["window"]:
            raise UserError(
                f"this run grouped {position['window']} batches by the length of their captions, which this version "
                "does not: start again in a new --workdir, or resume with the former version"
            )
        self.iterator.set_state(position["iterator"])

    def next_batch(self) -> dict[str, np.ndarray]:
        """Returns this process's rows of the next batch. Raises UserError if a data worker was killed."""
        with workers.signals_blocked(), workers.deaths_explained():
            return next(self.iterator)

    def put(self, local: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Puts what `next_batch` gave on the devices, as the next step takes it: the model may write texts for it."""
        arrays = {name: array for name, array in local.items() if name != "references"}
        batch = meshes.put_batch(arrays, self.mesh)
        if self._rollout is None:
            return batch
        with self._announce.first("compiling the beam search and running it once"):
            params = partition.join(self.frozen, self.state.params)  # those that the step changes, not their average
            return self._rollout(self._drawn, params, batch, local["references"])

    @property
    def _drawn(self) -> int:
        """Which of `plan.tasks` the next step takes."""
        return elastic.drawn(self.config.seed, self.step, len(self.plan.tasks))

    def program(self, batch: dict[str, jax.Array]) -> Program:
        """Returns the next step, compiled for the shape of a batch. Without packs each text length needs its own."""
        number = self._drawn
        key = number, frozenset((name, x.shape) for name, x in batch.items())
        if key not in self._programs:
            self._programs[key] = self._compile(number, self.state, self.frozen, batch)
        return self._programs[key]

    @contextlib.contextmanager
    def _compiling(self) -> Iterator[None]:
        """Compiles the step in a thread meanwhile, if all batches have one shape."""
        config = self.config
        rows = meshes.local_rows(self.mesh, config.train.batch_size)
        whole = len(rows) == config.train.batch_size or self._rollout  # every process knows the lengths of all texts
        if not self.packing and config.data.pad_multiple and whole:
            yield  # the first batch tells the length of its texts
            return
        batch = self.plan.abstract_batch(config.train.batch_size, self.packing and self.packing.pack)
        with ThreadPoolExecutor(1) as pool:
            numbers = range(len(self.plan.steps))
            compiled = [pool.submit(self._compile, number, *self.plan.abstract, batch) for number in numbers]
            yield
        shapes = frozenset((name, x.shape) for name, x in batch.items())
        self._programs |= {(number, shapes): compiled[number].result() for number in numbers}

    def _compile(self, number: int, state: TrainState, frozen: dict, batch: dict) -> Program:
        """Compiles one of `plan.steps` for these arguments, which may be abstract."""
        length = batch[f"{self.task.batch.main_text}_ids"].shape[-1]
        texts = f"{self.packing.pack.examples} texts with {length}" if self.packing else f"texts of {length}"
        count = len(self.plan.steps)
        budget = f", budget {number + 1} of {count}" if count > 1 else ""
        with self._announce.first("compiling the training step", f"for {texts} tokens{budget}"):
            traced = self.plan.steps[number].trace(state, frozen, batch)
            return Program(traced.lower().compile(), count_flops(traced.jaxpr))

    def run_step(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Takes one step and returns its metrics as scalars on the devices."""
        run = self.program(batch).run
        with jax.transfer_guard("disallow"):
            self.state, metrics = run(self.state, self.frozen, batch)
        self.step += 1
        return metrics


def plan_packing(config: ConfigDict, task: Task, mesh: Mesh, source: Source) -> packing.PackPlan | None:
    """Returns how captions are packed, from the config and the lengths of those in `source`; None: not at all."""
    micro = config.train.accumulate
    size = packing.pack_size(config.data, config.train.batch_size, meshes.batch_shards(mesh), micro)
    if not size:
        return None
    parts = parts_of(config.data, source)
    threads = config.data.read_threads
    return packing.plan(config.data, task.batch, size, micro, lambda: packing.measure(parts, task.batch, threads))


def make_iterator(
    config: ConfigDict,
    task: Task,
    mesh: Mesh,
    source: Source,
    packing: packing.PackPlan | None,
    skipped: Skipped,
    timings: Timings,
) -> grain.DatasetIterator:
    iterator = pipeline.make_train_iterator(
        config.data,
        source,
        task.batch,
        batch_size=config.train.batch_size,
        seed=config.seed,
        rows=meshes.local_rows(mesh, config.train.batch_size),
        packing=packing,
        skipped=skipped,
        timings=timings,
    )
    if config.train.overfit_one_batch:
        with workers.signals_blocked():
            first = next(iterator)
        iterator = iter(grain.MapDataset.source([first]).repeat().to_iter_dataset())
    return iterator


def describe(trainer: Trainer, start: int) -> str:
    count = {
        kind: sum(math.prod(x.shape) for x in traverse_util.flatten_dict(tree).values())
        for kind, tree in (("trained", trainer.state.params), ("frozen", trainer.frozen))
    }
    mesh = ", ".join(f"{axis} {size}" for axis, size in trainer.mesh.shape.items())
    frozen = ", ".join(f"{name}: {source}" for name, source in trainer.task.sources.items())
    return (
        f"{count['trained']:,} trained and {count['frozen']:,} frozen parameters ({frozen}) on {trainer.mesh.size} "
        f"{jax.devices()[0].platform} device(s) ({mesh}); " + (f"resuming at step {start}" if start else "new run")
    )
