"""The training loop: resume; then per step maybe evaluate, maybe save, draw the batch, step, maybe log."""

import signal
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from simvlg_jax import config as configs
from simvlg_jax import weights
from simvlg_jax.convert import stacking
from simvlg_jax.data import pipeline
from simvlg_jax.data.sources import load_source
from simvlg_jax.errors import UserError
from simvlg_jax.evaluation import validation
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.training import partition
from simvlg_jax.training import step as steps
from simvlg_jax.training.checkpoint import Checkpoints, check_frozen
from simvlg_jax.training.flops import count_flops
from simvlg_jax.training.logging import MetricsLog, memory_gb
from simvlg_jax.training.optimizer import learning_rate, make_optimizer
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
        if config.train.batch_size % (config.train.accumulate * meshes.batch_shards(self.mesh)):
            raise UserError(
                f"train.batch_size {config.train.batch_size} does not divide over "
                f"{meshes.batch_shards(self.mesh)} devices times {config.train.accumulate} micro-batches",
                2,
            )
        self.task = build_task(config)
        self.skipped = pipeline.Skipped()
        self.iterator = make_iterator(config, self.task, self.skipped)
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        key = jax.random.key(config.seed)
        params, self.frozen = steps.init_params(self.task, self.mesh, key, jnp.dtype(config.frozen_dtype))
        boxed = jax.eval_shape(self.task.init, key)
        shardings = meshes.param_shardings(boxed, self.mesh)
        param_shardings, frozen_shardings = partition.split(shardings, self.task.is_trained)

        def init_state(params: dict) -> steps.TrainState:
            return steps.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

        abstract = jax.eval_shape(init_state, params)
        state_shardings = steps.state_shardings(optimizer, abstract, param_shardings, self.mesh)
        self.state = jax.jit(init_state, out_shardings=state_shardings)(params)
        lr = learning_rate(config.optimizer, config.train.steps)
        self.step = steps.make_step(
            self.task,
            optimizer,
            lr,
            self.mesh,
            state_shardings,
            frozen_shardings,
            seed=config.seed,
            accumulate=config.train.accumulate,
        )
        check_frozen(workdir, self.frozen, self.task.sources)
        newest = checkpoints.latest() if checkpoints else None
        if newest is not None:
            self.state = checkpoints.restore(newest, self.state, self.iterator)
        self._jitted = self.step.jit()
        self._flops: dict[tuple[int, ...], int] = {}

    @property
    def params(self) -> dict:
        return partition.join(self.frozen, self.state.params)

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


def make_iterator(config: ConfigDict, task: Task, skipped: pipeline.Skipped) -> grain.DatasetIterator:
    iterator = pipeline.make_train_iterator(
        config.data,
        load_source(config.data, "train"),
        task.text_encoder,
        image_size=task.image_size,
        batch_size=config.train.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        skipped=skipped,
        sentence_encoder=task.sentence_encoder,
    )
    if config.train.overfit_one_batch:
        first = next(iterator)
        iterator = iter(grain.MapDataset.source([first]).repeat().to_iter_dataset())
    return iterator


class StopSignals:
    """Remembers SIGINT and SIGTERM so that the loop can save first; a second one acts as usual."""

    def __enter__(self) -> "StopSignals":
        self.received: signal.Signals | None = None
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, _frame) -> None:
        self.received = signal.Signals(number)
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def train(config: ConfigDict, workdir: Path) -> int:
    """Trains until `train.steps`, `train.max_minutes`, SIGINT or SIGTERM; starts where the workdir's run stopped.

    Returns:
      0, or 128 + the signal's number after SIGINT or SIGTERM. The run is saved in either case.

    Raises:
      UserError: an unusable config, data, weights or workdir; a loss that is not finite, with its step.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    configs.save_config(config, workdir)
    checkpoints = Checkpoints(workdir, config.train.keep_last, config.train.keep_best)
    with StopSignals() as signals:
        trainer = Trainer(config, workdir, checkpoints)
        start, total = int(trainer.state.step), config.train.steps
        log = MetricsLog(workdir, total, start)
        log.say(describe(trainer, start))
        try:
            outcome = _steps(trainer, checkpoints, log, signals, start, total)
        finally:
            checkpoints.close()
            log.close()
    if config.task == "contrastive" and signals.received is None and jax.process_index() == 0:
        vit = jax.device_get(trainer.state.params["vit"])
        weights.write_tree(workdir / "vit.safetensors", vit if config.vit.scan else stacking.stack_layers(vit))
    log.say(f"{outcome}; checkpoints in {workdir / 'checkpoints'}")
    return 128 + signals.received if signals.received else 0


def describe(trainer: Trainer, start: int) -> str:
    count = {
        kind: sum(x.size for x in jax.tree.leaves(tree))
        for kind, tree in (("trained", trainer.state.params), ("frozen", trainer.frozen))
    }
    places = ", ".join(f"{axis} {size}" for axis, size in trainer.mesh.shape.items())
    return (
        f"{count['trained']:,} trained and {count['frozen']:,} frozen parameters on {trainer.mesh.size} "
        f"{jax.devices()[0].platform} device(s) ({places}); " + (f"resuming at step {start}" if start else "new run")
    )


def _steps(
    trainer: Trainer, checkpoints: Checkpoints, log: MetricsLog, signals: StopSignals, start: int, total: int
) -> str:
    train_config = trainer.config.train
    deadline = time.monotonic() + 60 * train_config.max_minutes if train_config.max_minutes else float("inf")
    pending: list[tuple[int, jax.Array]] = []  # losses not yet looked at
    window_start, window_wait, window_images, window_flops = time.monotonic(), 0.0, 0, 0
    evaluated: dict[int, float] = {}
    step = start
    while True:
        out_of_time = time.monotonic() > deadline
        last = step >= total or out_of_time or signals.received is not None
        if step > start and (last or step % train_config.eval_every == 0 or step % train_config.save_every == 0):
            check_finite(pending)
            if signals.received is None and (step % train_config.eval_every == 0 or last):
                before = time.monotonic()
                results = validation.validate(trainer.task, trainer.config, trainer.params, trainer.mesh)
                log.write(step, "eval", results)
                evaluated[step] = results["score"]
                pause = time.monotonic() - before
                deadline, window_start = deadline + pause, window_start + pause
            if last or step % train_config.save_every == 0:
                checkpoints.save(step, trainer.state, trainer.iterator, evaluated.get(step))
        if last:
            reason = f"stopped by {signals.received.name}" if signals.received else "out of time"
            return (
                f"{reason} at step {step} of {total}, run again to resume" if step < total else f"done: {total} steps"
            )

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
            values["data_wait"] = window_wait / seconds
            values["tflops"] = window_flops / seconds / 1e12
            values["memory_gb"] = memory_gb()
            if trainer.skipped.count:
                values["unreadable"] = float(trainer.skipped.count)
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
