"""The training loop: resumes, then for each step: save and evaluate if due, draw a batch, take the step, log if due."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from signal import Signals

import jax
from ml_collections import ConfigDict

from simvlg_jax.config import saved
from simvlg_jax.parallel import collectives
from simvlg_jax.training import run_lock
from simvlg_jax.training.checkpoint import Checkpoints
from simvlg_jax.training.frozen import write_frozen
from simvlg_jax.training.meter import Meter
from simvlg_jax.training.metrics_log import MetricsLog, memory_gb, read_evaluated, say
from simvlg_jax.training.stopping import Stop
from simvlg_jax.training.trainer import Trainer, describe
from simvlg_jax.utils.errors import UserError
from simvlg_jax.utils.progress import Announcer


def train(config: ConfigDict, workdir: Path) -> int:
    """Trains until `train.steps`, `train.max_minutes`, SIGINT or SIGTERM; starts where the workdir's run stopped.

    The config is written after config, data, sizes and weights have been checked.

    Returns:
      0, or 128 + the signal number after SIGINT or SIGTERM. The run is saved in either case.

    Raises:
      UserError: the config, data, weights or workdir cannot be used, another process trains in the workdir, or a loss
        is not finite.
    """
    with contextlib.ExitStack() as stack:
        lock = None
        if jax.process_index() == 0:
            workdir.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(run_lock.hold(workdir))
            saved.check_workdir(config, workdir)
        collectives.wait_for_all("the workdir is locked")
        if not (workdir / run_lock.LOCK).exists():
            raise UserError(f"{workdir} is not the same folder on every machine: put it on a shared disk")
        stop = stack.enter_context(Stop(config.train.max_minutes))
        kept = config.train.keep_last, config.train.keep_best, config.train.best_by
        with contextlib.closing(Checkpoints(workdir, *kept)) as checkpoints:
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
            params = jax.tree.map(collectives.gather, trainer.state.final)
            if jax.process_index() == 0:
                trainer.task.after_run(params, workdir)
    say(f"{outcome}; checkpoints in {workdir / 'checkpoints'}")
    return 128 + signal if signal else 0


class Run:
    """The loop over the steps, from the start or resumption of a run to its end.

    Args:
      check_lock: raises UserError if another process has taken over the workdir.
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
        """Trains and returns why it ended, in words, and the signal that stopped it, if any."""
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
                values = self.meter.read(self.trainer.skipped, self.trainer.timings)
                self.check_lock()
                self.log.write(step, "train", values)

    def step(self, step: int) -> dict[str, jax.Array]:
        """Draws a batch and takes the step that follows `step`."""
        with self.meter.waiting():
            local = self.trainer.next_batch()
        batch = self.trainer.put(local)
        flops = self.trainer.program(batch).flops
        metrics = self.trainer.run_step(batch)
        self.meter.add(step + 1, metrics, len(next(iter(batch.values()))), flops)
        return metrics

    def save(self, step: int) -> None:
        self.meter.check_finite()
        self.check_lock()
        self.checkpoints.save(step, self.trainer.state, self.trainer.position)

    def evaluate(self, step: int, last: bool) -> None:
        """Runs the evaluators that are due. An evaluation that an interrupted run missed is made up when it resumes."""
        for evaluator in self.trainer.evaluators:
            if not (last or step % evaluator.every == 0):
                continue
            logged = (step, evaluator.name) in self.evaluated
            if collectives.numbers_of_all(logged)[0, 0]:  # process 0 writes the log, so its value counts
                continue
            self.meter.check_finite()
            before = time.monotonic()
            result = evaluator(self.trainer.params, self.announce)
            self.check_lock()
            self.log.write(step, "eval", {"split": evaluator.name, "score": result.score, **result.metrics})
            self.evaluated.add((step, evaluator.name))
            if evaluator.name == self.trainer.config.train.best_by and result.score is not None:
                self.checkpoints.score(step, result.score)
            pause = time.monotonic() - before
            self.stop.grant(pause)
            self.meter.pause(pause)
