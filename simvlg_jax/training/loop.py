"""The training loop: resume; then per step maybe save, maybe evaluate, draw the batch, step, maybe log."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from signal import Signals
from typing import NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simvlg_jax.config import saved
from simvlg_jax.data import pipeline, workers
from simvlg_jax.data.sources import load_source
from simvlg_jax.evaluation.evaluators import make_evaluators
from simvlg_jax.parallel import collectives
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.tasks import build_task
from simvlg_jax.tasks import params as partition
from simvlg_jax.tasks.task import Task
from simvlg_jax.training import run_lock
from simvlg_jax.training.checkpoint import Checkpoints
from simvlg_jax.training.flops import count_flops
from simvlg_jax.training.frozen import check_frozen, describe_frozen, write_frozen
from simvlg_jax.training.meter import Meter
from simvlg_jax.training.metrics_log import MetricsLog, memory_gb, read_evaluated, say
from simvlg_jax.training.plan import Plan
from simvlg_jax.training.stopping import Stop
from simvlg_jax.utils.errors import UserError
from simvlg_jax.utils.progress import SILENT, Announcer


class Program(NamedTuple):
    """A compiled step for one shape of batches: run(state, frozen, batch), and its FLOPs over all devices."""

    run: Callable
    flops: int


class Trainer:
    """Everything a run needs, in place on the devices: made once, before the first step.

    Attributes:
      task, mesh, plan: see their modules.
      evaluators: those of the config that run while training.
      frozen: the frozen parameters.
      frozen_entries: what frozen.json holds of them.
      state: the TrainState, restored from the newest whole checkpoint if there is one.
      iterator: the training batches, standing where the checkpoint left it.
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
        self.skipped = pipeline.Skipped()
        # What is wrong with the data shows before the weights are read, which may take minutes.
        self.iterator = make_iterator(config, self.task, self.mesh, self.skipped)
        self.evaluators = make_evaluators(self.task, config, self.mesh)
        rows = meshes.local_rows(self.mesh, config.train.batch_size)
        self._window = pipeline.length_window(config.data, len(rows) == config.train.batch_size)
        with announce.first("reading and initialising the weights"):
            params, self.frozen = self.plan.init_params()
            self.frozen_entries = describe_frozen(self.frozen, self.task.sources)
            self.state = self.plan.init_state(params)
        self._announce = announce
        if checkpoints and checkpoints.steps():
            check_frozen(workdir, self.frozen_entries)
        restored = checkpoints.restore_newest(self.state) if checkpoints else None
        if restored is not None:
            self.state = restored.state
            self.move_to(restored.position)
        self._programs: dict[tuple, Program] = {}

    @property
    def params(self) -> dict:
        return partition.join(self.frozen, self.state.params)

    @property
    def position(self) -> dict:
        """Where the data stands: batches drawn, by any number of processes."""
        return {"window": self._window, "iterator": self.iterator.get_state()}

    def move_to(self, position: dict) -> None:
        """Puts the data where `position` says.

        Raises:
          UserError: the checkpoint was written with length grouping (`data.length_window`) and this run cannot group,
            since it has several processes, or vice versa.
        """
        if position["window"] != self._window:
            raise UserError(
                f"this run groups {position['window']} batches by length and {jax.process_count()} process(es) group "
                f"{self._window}: resume with as many processes as before, or start with data.length_window=1"
            )
        self.iterator.set_state(position["iterator"])

    def next_batch(self) -> dict[str, np.ndarray]:
        """This process's rows of the next batch."""
        with workers.signals_blocked():
            return next(self.iterator)

    def program(self, batch: dict[str, jax.Array]) -> Program:
        """The step compiled for such a batch; each length of the texts needs one."""
        shapes = tuple(x.shape for x in batch.values())
        if shapes not in self._programs:
            length = batch[f"{self.task.batch.main_text}_ids"].shape[1]
            with self._announce.first("compiling the training step", f"for texts of {length} tokens"):
                traced = self.plan.step.trace(self.state, self.frozen, batch)
                self._programs[shapes] = Program(traced.lower().compile(), count_flops(traced.jaxpr))
        return self._programs[shapes]

    def run_step(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Takes one step; returns its metrics, scalars on the devices."""
        run = self.program(batch).run
        with jax.transfer_guard("disallow"):
            self.state, metrics = run(self.state, self.frozen, batch)
        return metrics


def make_iterator(config: ConfigDict, task: Task, mesh: Mesh, skipped: pipeline.Skipped) -> grain.DatasetIterator:
    iterator = pipeline.make_train_iterator(
        config.data,
        load_source(config.data, "train", training=True),
        task.batch,
        batch_size=config.train.batch_size,
        seed=config.seed,
        rows=meshes.local_rows(mesh, config.train.batch_size),
        skipped=skipped,
    )
    if config.train.overfit_one_batch:
        with workers.signals_blocked():
            first = next(iterator)
        iterator = iter(grain.MapDataset.source([first]).repeat().to_iter_dataset())
    return iterator


def train(config: ConfigDict, workdir: Path) -> int:
    """Trains until `train.steps`, `train.max_minutes`, SIGINT or SIGTERM; starts where the workdir's run stopped.

    The config is written once config, data, sizes and weights have been found usable.

    Returns:
      0, or 128 + the signal's number after SIGINT or SIGTERM. The run is saved in either case.

    Raises:
      UserError: an unusable config, data, weights or workdir; a workdir that another process trains in; a loss that is
        not finite, with its step.
    """
    with contextlib.ExitStack() as stack:
        lock = None
        if jax.process_index() == 0:
            workdir.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(run_lock.hold(workdir))
            saved.check_workdir(config, workdir)
        collectives.wait_for_all("the workdir is ours")
        if not (workdir / run_lock.LOCK).exists():
            raise UserError(f"{workdir} is not the same folder on every machine: put it on a disk that all share")
        stop = stack.enter_context(Stop(config.train.max_minutes))
        with contextlib.closing(Checkpoints(workdir, config.train.keep_last, config.train.keep_best)) as checkpoints:
            announce = Announcer(say)
            trainer = Trainer(config, workdir, checkpoints, announce)
            if jax.process_index() == 0:
                saved.save_config(config, workdir)
                write_frozen(workdir, trainer.frozen_entries)
            start, total = int(trainer.state.step), config.train.steps
            log = MetricsLog(workdir, total, start)
            say(describe(trainer, start))
            check_lock = lock.check if lock else lambda: None
            with contextlib.closing(log):
                run = Run(trainer, checkpoints, log, announce, stop, check_lock, read_evaluated(workdir))
                outcome, signal = run.steps(start, total)
        if trainer.task.after_run is not None and signal is None:
            params = jax.tree.map(collectives.gather, trainer.state.params)
            if jax.process_index() == 0:
                trainer.task.after_run(params, workdir)
    say(f"{outcome}; checkpoints in {workdir / 'checkpoints'}")
    return 128 + signal if signal else 0


def describe(trainer: Trainer, start: int) -> str:
    count = {
        kind: sum(x.size for x in jax.tree.leaves(tree))
        for kind, tree in (("trained", trainer.state.params), ("frozen", trainer.frozen))
    }
    places = ", ".join(f"{axis} {size}" for axis, size in trainer.mesh.shape.items())
    frozen = ", ".join(f"{name}: {source}" for name, source in trainer.task.sources.items())
    return (
        f"{count['trained']:,} trained and {count['frozen']:,} frozen parameters ({frozen}) on {trainer.mesh.size} "
        f"{jax.devices()[0].platform} device(s) ({places}); " + (f"resuming at step {start}" if start else "new run")
    )


class Run:
    """The steps of a start: what each takes part in.

    Args:
      check_lock: raises if another process has taken the workdir.
      evaluated: (step, name) of the evaluations that are logged already.
    """

    def __init__(
        self,
        trainer: Trainer,
        checkpoints: Checkpoints,
        log: MetricsLog,
        announce: Announcer,
        stop: Stop,
        check_lock: Callable[[], None],
        evaluated: set[tuple[int, str]],
    ):
        self.trainer, self.checkpoints, self.log, self.announce = trainer, checkpoints, log, announce
        self.stop, self.check_lock, self.evaluated = stop, check_lock, evaluated
        self.meter = Meter()

    def steps(self, start: int, total: int) -> tuple[str, Signals | None]:
        """What ended the training, in words, and the signal if it was one."""
        config, step = self.trainer.config.train, start
        while True:
            stopped = step < total and self.stop.reached(step)
            signal = self.stop.reason() if stopped else None
            last = step >= total or stopped
            if step > start and (last or step % config.save_every == 0):
                self.save(step)
            if step and signal is None:
                self.evaluate(step, last)
            if stopped:
                reason = f"stopped by {signal.name}" if signal else "out of time"
                return f"{reason} at step {step} of {total}, run again to resume", signal
            if last:
                return f"done: {total} steps", None
            metrics = self.step(step)
            step += 1
            self.log.advance()
            if step == start + 1:
                loss = float(metrics["loss"])
                say(f"first step of this start: {step}/{total}, loss {loss:.4g}, memory {memory_gb():.2f} GB")
            if step % config.log_every == 0:
                values = self.meter.read(metrics, self.trainer.skipped.count)
                self.check_lock()
                self.log.write(step, "train", values)

    def step(self, step: int) -> dict[str, jax.Array]:
        """Takes the step after `step`."""
        with self.meter.waiting():
            local = self.trainer.next_batch()
        batch = meshes.put_batch(local, self.trainer.mesh)
        flops = self.trainer.program(batch).flops
        metrics = self.trainer.run_step(batch)
        self.meter.add(step + 1, metrics["loss"], len(next(iter(batch.values()))), flops)
        return metrics

    def save(self, step: int) -> None:
        self.meter.check_finite()
        self.check_lock()
        self.checkpoints.save(step, self.trainer.state, self.trainer.position)

    def evaluate(self, step: int, last: bool) -> None:
        """Runs the evaluators that are due. A run that died before it evaluated does so when it is resumed."""
        for number, evaluator in enumerate(self.trainer.evaluators):
            if not (last or step % evaluator.every == 0):
                continue
            logged = (step, evaluator.name) in self.evaluated
            if collectives.numbers_of_all(logged)[0, 0]:  # what process 0 has logged counts
                continue
            self.meter.check_finite()
            before = time.monotonic()
            result = evaluator(self.trainer.params, self.announce)
            score = {} if number else {"score": result.score}
            self.check_lock()
            self.log.write(step, "eval", {"split": evaluator.name, **score, **result.metrics})
            self.evaluated.add((step, evaluator.name))
            if not number:
                self.checkpoints.score(step, result.score)
            pause = time.monotonic() - before
            self.stop.grant(pause)
            self.meter.pause(pause)
