"""The training loop: resume; then per step maybe evaluate, maybe save, draw the batch, step, maybe log."""

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
from simvlg_jax.convert import own_files, stacking
from simvlg_jax.data import pipeline, workers
from simvlg_jax.data.sources import load_source
from simvlg_jax.evaluation.validation import Validation
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.parallel import processes
from simvlg_jax.tasks import params as partition
from simvlg_jax.tasks.task import Task, build_task
from simvlg_jax.training import run_lock
from simvlg_jax.training import step as steps
from simvlg_jax.training.checkpoint import Checkpoints
from simvlg_jax.training.flops import count_flops
from simvlg_jax.training.frozen import check_frozen, describe_frozen, write_frozen
from simvlg_jax.training.metrics_log import MetricsLog, memory_gb, say
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
      task, mesh, step: see their modules.
      validation: scores parameters, or None if the config asks for no validation.
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
        plan = steps.make_plan(self.task, config, self.mesh)
        self.skipped = pipeline.Skipped()
        # What is wrong with the data shows before the weights are read, which may take minutes.
        self.iterator = make_iterator(config, self.task, self.mesh, self.skipped)
        self.validation = Validation(self.task, config, self.mesh) if config.train.eval_every else None
        rows = meshes.local_rows(self.mesh, config.train.batch_size)
        self._window = pipeline.length_window(config.data, len(rows) == config.train.batch_size)
        with announce.first("reading and initialising the weights"):
            params, self.frozen = steps.init_params(self.task, config, self.mesh)
            self.frozen_entries = describe_frozen(self.frozen, self.task.sources)
            self.state = plan.init_state(params)
        self.step = plan.step
        self._announce = announce
        if checkpoints and checkpoints.steps():
            check_frozen(workdir, self.frozen_entries)
        restored = checkpoints.restore_newest(self.state) if checkpoints else None
        if restored is not None:
            self.state = restored.state
            self.move_to(restored.position)
        self._jitted = self.step.jit()
        self._programs: dict[tuple[int, ...], Program] = {}

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
        shape = batch["ids"].shape
        if shape not in self._programs:
            with self._announce.first("compiling the training step", f"for texts of {shape[1]} tokens"):
                traced = self._jitted.trace(self.state, self.frozen, batch)
                self._programs[shape] = Program(traced.lower().compile(), count_flops(traced.jaxpr))
        return self._programs[shape]

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
        task.text_encoder,
        image_size=task.image_size,
        batch_size=config.train.batch_size,
        seed=config.seed,
        rows=meshes.local_rows(mesh, config.train.batch_size),
        skipped=skipped,
        sentence_encoder=task.sentence_encoder,
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
        processes.wait_for_all("the workdir is ours")
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
                outcome, signal = _steps(trainer, checkpoints, log, announce, stop, check_lock, start, total)
        if config.task == "contrastive" and signal is None:
            vit = jax.tree.map(processes.gather, trainer.state.params["vit"])
            if jax.process_index() == 0:
                own_files.write_tree(
                    workdir / "vit.safetensors", vit if config.vit.scan else stacking.stack_layers(vit)
                )
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


def _steps(
    trainer: Trainer,
    checkpoints: Checkpoints,
    log: MetricsLog,
    announce: Announcer,
    stop: Stop,
    check_lock: Callable[[], None],
    start: int,
    total: int,
) -> tuple[str, Signals | None]:
    """What ended the training, in words, and the signal if it was one."""
    train_config = trainer.config.train
    pending: list[tuple[int, jax.Array]] = []  # losses not yet looked at
    window_start, window_wait, window_images, window_flops = time.monotonic(), 0.0, 0, 0
    step = start
    while True:
        stopped = step < total and stop.reached(step)
        signal = stop.reason() if stopped else None
        last = step >= total or stopped
        evaluate = (
            trainer.validation is not None
            and signal is None
            and (last or step % train_config.eval_every == 0)
            and step > 0
            and not checkpoints.is_scored(step)  # a run that died before it evaluated does so when it is resumed
        )
        save = step > start and (last or step % train_config.save_every == 0)
        if save or evaluate:
            check_finite(pending)
        if save:
            check_lock()
            checkpoints.save(step, trainer.state, trainer.position)
        if evaluate:
            before = time.monotonic()
            results = trainer.validation(trainer.params, announce)
            check_lock()
            log.write(step, "eval", results)
            checkpoints.score(step, results["score"])
            pause = time.monotonic() - before
            stop.grant(pause)
            window_start += pause
        if stopped:
            reason = f"stopped by {signal.name}" if signal else "out of time"
            return f"{reason} at step {step} of {total}, run again to resume", signal
        if last:
            return f"done: {total} steps", None

        before = time.monotonic()
        local = trainer.next_batch()
        window_wait += time.monotonic() - before
        batch = meshes.put_batch(local, trainer.mesh)
        window_flops += trainer.program(batch).flops
        metrics = trainer.run_step(batch)
        step += 1
        pending.append((step, metrics["loss"]))
        window_images += batch["image"].shape[0]
        log.advance()
        if step == start + 1:
            loss = float(metrics["loss"])
            say(f"first step of this start: {step}/{total}, loss {loss:.4g}, memory {memory_gb():.2f} GB")
        if step % train_config.log_every == 0:
            check_finite(pending)
            seconds = time.monotonic() - window_start
            values = {name: float(value) for name, value in metrics.items()}
            values["loss"] = float(np.mean(jax.device_get([loss for _, loss in pending])))
            values["images_per_second"] = window_images / seconds
            values["tflops"] = window_flops / seconds / 1e12
            # Of the process that waits longest and of the fullest: the others wait for them.
            everyones = processes.numbers_of_all(window_wait / seconds, memory_gb(), trainer.skipped.count)
            values["data_wait"], values["memory_gb"] = map(float, everyones[:, :2].max(0))
            if unreadable := float(everyones[:, 2].sum()):
                values["unreadable"] = unreadable
            check_lock()
            log.write(step, "train", values)
            pending.clear()
            window_start, window_wait, window_images, window_flops = time.monotonic(), 0.0, 0, 0


def check_finite(losses: list[tuple[int, jax.Array]]) -> None:
    """Raises UserError naming the steps whose loss is not finite."""
    values = jax.device_get([loss for _, loss in losses])
    bad = [step for (step, _), value in zip(losses, values, strict=True) if not np.isfinite(value)]
    if bad:
        raise UserError(
            f"the loss is not finite at step {', '.join(map(str, bad[:5]))}: nothing after the last checkpoint is "
            "saved. Lower optimizer.lr, set optimizer.clip_norm=1, or use dtype float32, in a new workdir"
        )
