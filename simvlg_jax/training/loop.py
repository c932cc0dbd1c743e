"""The training loop: resume; then per step maybe evaluate, maybe save, draw the batch, step, maybe log."""

import time
from pathlib import Path
from signal import Signals

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simvlg_jax import config as configs
from simvlg_jax import weights
from simvlg_jax.convert import stacking
from simvlg_jax.data import pipeline
from simvlg_jax.data.sources import load_source
from simvlg_jax.errors import UserError
from simvlg_jax.evaluation import validation
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.parallel import processes
from simvlg_jax.training import partition
from simvlg_jax.training import step as steps
from simvlg_jax.training.checkpoint import Checkpoints
from simvlg_jax.training.flops import count_flops
from simvlg_jax.training.frozen import check_frozen
from simvlg_jax.training.logging import MetricsLog, memory_gb
from simvlg_jax.training.stopping import Stop
from simvlg_jax.training.tasks import Task, build_task


class Trainer:
    """Everything a run needs, in place on the devices: made once, before the first step.

    Attributes:
      task, mesh, step: see their modules.
      state: the TrainState, restored from the newest checkpoint if there is one.
      frozen: the frozen parameters.
      iterator: the training batches, standing where the checkpoint left it.
    """

    def __init__(self, config: ConfigDict, workdir: Path, checkpoints: Checkpoints | None = None):
        self.config = config
        self.mesh = meshes.make_mesh(config.mesh)
        self.task = build_task(config)
        plan = steps.make_plan(self.task, config, self.mesh)
        self.skipped = pipeline.Skipped()
        self.iterator = make_iterator(config, self.task, self.mesh, self.skipped)
        rows = meshes.local_rows(self.mesh, config.train.batch_size)
        self._window = pipeline.length_window(config.data, len(rows) == config.train.batch_size)
        params, self.frozen = steps.init_params(self.task, config, self.mesh)
        self.state = plan.init_state(params)
        self.step = plan.step
        check_frozen(workdir, self.frozen, self.task.sources)
        newest = checkpoints.latest() if checkpoints else None
        if newest is not None:
            self.state, position = checkpoints.restore(newest, self.state)
            self.move_to(position)
        self._jitted = self.step.jit()
        self._flops: dict[tuple[int, ...], int] = {}

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
          UserError: lengths were grouped (`data.length_window`), which only a single process does, or the other way.
        """
        if position["window"] != self._window:
            raise UserError(
                f"this run groups {position['window']} batches by length and {jax.process_count()} process(es) group "
                f"{self._window}: resume with as many processes as before, or start with data.length_window=1"
            )
        self.iterator.set_state(position["iterator"])

    def flops(self, batch: dict[str, jax.Array]) -> int:
        """Matrix-product FLOPs of one step on such a batch, over all devices."""
        shape = batch["ids"].shape
        if shape not in self._flops:
            self._flops[shape] = count_flops(self._jitted.trace(self.state, self.frozen, batch).jaxpr)
        return self._flops[shape]

    def run_step(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        with jax.transfer_guard("disallow"):
            self.state, metrics = self._jitted(self.state, self.frozen, batch)
        return metrics


def make_iterator(config: ConfigDict, task: Task, mesh: Mesh, skipped: pipeline.Skipped) -> grain.DatasetIterator:
    iterator = pipeline.make_train_iterator(
        config.data,
        load_source(config.data, "train"),
        task.text_encoder,
        image_size=task.image_size,
        batch_size=config.train.batch_size,
        seed=config.seed,
        rows=meshes.local_rows(mesh, config.train.batch_size),
        skipped=skipped,
        sentence_encoder=task.sentence_encoder,
    )
    if config.train.overfit_one_batch:
        first = next(iterator)
        iterator = iter(grain.MapDataset.source([first]).repeat().to_iter_dataset())
    return iterator


def train(config: ConfigDict, workdir: Path) -> int:
    """Trains until `train.steps`, `train.max_minutes`, SIGINT or SIGTERM; starts where the workdir's run stopped.

    Returns:
      0, or 128 + the signal's number after SIGINT or SIGTERM. The run is saved in either case.

    Raises:
      UserError: an unusable config, data, weights or workdir; a loss that is not finite, with its step.
    """
    if jax.process_index() == 0:
        configs.save_config(config, workdir)
    processes.sync("the config is saved")
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir} is not the same folder on every machine: put --workdir on a disk that all share")
    checkpoints = Checkpoints(workdir, config.train.keep_last, config.train.keep_best)
    with Stop(config.train.max_minutes) as stop:
        trainer = Trainer(config, workdir, checkpoints)
        start, total = int(trainer.state.step), config.train.steps
        log = MetricsLog(workdir, total, start)
        log.say(describe(trainer, start))
        try:
            outcome, signal = _steps(trainer, checkpoints, log, stop, start, total)
        finally:
            checkpoints.close()
            log.close()
    if config.task == "contrastive" and signal is None:
        vit = jax.tree.map(processes.gather, trainer.state.params["vit"])
        if jax.process_index() == 0:
            weights.write_tree(workdir / "vit.safetensors", vit if config.vit.scan else stacking.stack_layers(vit))
    log.say(f"{outcome}; checkpoints in {workdir / 'checkpoints'}")
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
    trainer: Trainer, checkpoints: Checkpoints, log: MetricsLog, stop: Stop, start: int, total: int
) -> tuple[str, Signals | None]:
    """What ended the training, in words, and the signal if it was one."""
    train_config = trainer.config.train
    pending: list[tuple[int, jax.Array]] = []  # losses not yet looked at
    window_start, window_wait, window_images, window_flops = time.monotonic(), 0.0, 0, 0
    evaluated: dict[int, float] = {}
    step = start
    while True:
        stopped = step < total and stop.reached(step)
        signal = stop.reason() if stopped else None
        last = step >= total or stopped
        evaluate = train_config.eval_every and signal is None and (last or step % train_config.eval_every == 0)
        save = last or step % train_config.save_every == 0
        if step > start and (evaluate or save):
            check_finite(pending)
            if evaluate:
                before = time.monotonic()
                results = validation.validate(trainer.task, trainer.config, trainer.params, trainer.mesh)
                log.write(step, "eval", results)
                evaluated[step] = results["score"]
                pause = time.monotonic() - before
                stop.grant(pause)
                window_start += pause
            if save:
                checkpoints.save(step, trainer.state, trainer.position, evaluated.get(step))
        if stopped:
            reason = f"stopped by {signal.name}" if signal else "out of time"
            return f"{reason} at step {step} of {total}, run again to resume", signal
        if last:
            return f"done: {total} steps", None

        before = time.monotonic()
        local = next(trainer.iterator)
        window_wait += time.monotonic() - before
        batch = meshes.put_batch(local, trainer.mesh)
        window_flops += trainer.flops(batch)
        metrics = trainer.run_step(batch)
        step += 1
        pending.append((step, metrics["loss"]))
        window_images += batch["image"].shape[0]
        log.advance()
        if step == start + 1:
            jax.block_until_ready(metrics)
            seconds = time.monotonic() - window_start
            log.say(f"first step after {seconds:.1f} s of compiling, memory {memory_gb():.2f} GB")
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
