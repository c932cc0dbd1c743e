"""Orbax checkpoints of a run: trained state and data position, asynchronously, each array verified when it is read.

Several processes write one checkpoint into one folder, and any other number of them reads it.
"""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from simvlg_jax.parallel import collectives
from simvlg_jax.training.fingerprints import array_fingerprints
from simvlg_jax.training.metrics_log import FILE, read_scores
from simvlg_jax.training.step import TrainState
from simvlg_jax.utils.errors import UserError, first_line, warn

RETRY_SECONDS = 1.0  # between two tries to read a checkpoint


class Damaged(Exception):
    """A checkpoint that cannot be read, or whose arrays are not the ones that were saved; the message says what."""


class Restored(NamedTuple):
    """What `Checkpoints.restore_newest` found: the step, the state in its shardings, the position of the data."""

    step: int
    state: TrainState
    position: dict


@dataclass
class KeepBest:
    """Preserves the `n` checkpoints of the highest score, of equal ones the newest, and those of `always`.

    `scores` may gain entries while the run goes on.
    """

    scores: dict[int, float]
    n: int
    always: frozenset[int] = frozenset()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        scored = sorted((self.scores[c.step], c.step) for c in checkpoints if c.step in self.scores)
        best = {step for _, step in scored[len(scored) - self.n :]} if self.n else set()
        return [c.step in best | self.always for c in checkpoints]


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: holds checkpoints/ and the metrics log, whose scores say which checkpoint is best.
      keep_last: newest checkpoints kept.
      keep_best: checkpoints kept by the highest score, beside the newest.
    """

    def __init__(self, workdir: Path, keep_last: int = 1, keep_best: int = 0, read_only: bool = False):
        self._folder = (workdir / "checkpoints").resolve()
        self._scores = read_scores(workdir)
        unscored = frozenset(() if (workdir / FILE).exists() else self._steps_there())
        if unscored and jax.process_index() == 0:
            warn(
                f"{workdir / FILE} is missing, so the best checkpoint is not known: the newest counts as the best, "
                "and training deletes none of those that are there"
            )
        keep = [policies.LatestN(keep_last), KeepBest(self._scores, keep_best, unscored)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            # A checkpoint counts when its last file is there: renaming a folder is many operations on a bucket.
            atomicity_options=ocp.options.AtomicityOptions(ocp.options.AtomicityMode.COMMIT_FILE),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
        )
        if read_only and not self._folder.is_dir():
            raise UserError(f"{workdir} holds no checkpoint; train with simvlg_jax.train first")
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def _steps_there(self) -> list[int]:
        return [
            int(path.parent.name) for path in self._folder.glob("*/commit_success.txt") if path.parent.name.isdecimal()
        ]

    def steps(self) -> list[int]:
        """Steps of all checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """Newest step saved, or None."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step with the highest score, else the newest."""
        scored = [(self._scores[step], step) for step in self.steps() if step in self._scores]
        return max(scored)[1] if scored else self.latest()

    def choose(self, which: str) -> int:
        """The step that "best", "latest" or a number such as "2000" names.

        Raises:
          UserError: there is no such checkpoint; the message lists those that are there.
        """
        number = int(which) if which.isdecimal() else None
        found = {"best": self.best(), "latest": self.latest()}.get(which, number)
        if found not in self.steps():
            there = ", ".join(map(str, self.steps())) or "none yet; train with simvlg_jax.train first"
            raise UserError(f"no checkpoint {which!r} in {self._folder}; there are {there}")
        return found

    def save(self, step: int, state: TrainState, position: dict) -> None:
        """Starts saving in the background.

        Args:
          position: where the data iterator stood before it drew the batch after `step`; the same on every process.

        Raises:
          UserError: no space for it; nothing is written then, and what was saved before stays whole.
        """
        self._scores.pop(step, None)  # of a checkpoint that was there before
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(position),
            checks=ocp.args.JsonSave({"arrays": array_fingerprints(state), "data": _digest(position)}),
        )
        need_space(self._folder, state)
        with disk_errors(self._folder):
            if not self._manager.save(step, args=items):
                raise RuntimeError(f"checkpoint {step} was not saved: {self.latest()} is there already")

    def score(self, step: int, score: float) -> None:
        """Tells how good a checkpoint is; the metrics log remembers it."""
        self._scores[step] = score

    def restore_newest(self, abstract: TrainState) -> Restored | None:
        """The newest whole checkpoint to go on from, in the shardings of `abstract`; None if there is none at all.

        A damaged one that is newer is renamed to "STEP.damaged", with a warning, so that the run can save that step
        again.

        Raises:
          UserError: there are checkpoints and none is whole; nothing is renamed then.
        """
        damaged: dict[int, Damaged] = {}
        for step in reversed(self.steps()):
            try:
                restored = Restored(step, *self._restore(step, abstract))
            except Damaged as error:
                damaged[step] = error
                continue
            for broken, reason in damaged.items():
                self._set_aside(broken, reason, step)
            self._forget_after(step)
            return restored
        if damaged:
            raise UserError(self._explain(max(damaged), damaged[max(damaged)], None))
        self._forget_after(0)
        return None

    def _forget_after(self, step: int) -> None:
        """Drops the scores of steps that will be taken again."""
        for later in [s for s in self._scores if s > step]:
            del self._scores[later]

    def restore_params(self, step: int, abstract: dict) -> dict:
        """The trained parameters alone, in the shardings of `abstract`.

        Raises:
          UserError: it is damaged; the message names the newest whole one.
        """
        return self._or_explain(step, lambda s: self._restore_params(s, abstract))

    def _restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict]:
        read = self._read(step, state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        self._verify(read)
        return read.state, read.data

    def _restore_params(self, step: int, abstract: dict) -> dict:
        tree = {"params": abstract}
        arguments = ocp.args.PyTreeRestore(
            tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
        )
        read = self._read(step, state=arguments)
        self._verify(read)
        return read.state["params"]

    def _read(self, step: int, **items: ocp.args.CheckpointArgs) -> ocp.args.Composite:
        """The items of a checkpoint and its "checks", which are None in checkpoints of older versions.

        Raises Damaged on every process if one cannot read its part twice.
        """
        for last in (False, True):
            reason = None
            try:
                read = self._read_alone(self._folder / str(step), items)
            except (jax.errors.JaxRuntimeError, MemoryError):  # too little memory, or a device that failed
                raise
            except Exception as error:  # Orbax and TensorStore raise many kinds, bare ones included
                reason = first_line(error)
            if not collectives.numbers_of_all(reason is not None).any():
                break
            if last:
                raise Damaged(reason or "another process cannot read its part")
            time.sleep(RETRY_SECONDS)  # a disk that is far away may fail for a moment
        if read.checks is None and jax.process_index() == 0:
            warn(f"checkpoint {step} holds no checksums (an older version wrote it), so it is not verified")
        return read

    def _read_alone(self, folder: Path, items: dict[str, ocp.args.CheckpointArgs]) -> ocp.args.Composite:
        """`_read` for this process; it waits for no other, so that an error in one blocks none."""
        named = json.loads((folder / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
        if has_checks := "checks" in named or (folder / "checks").exists():
            items = items | {"checks": ocp.args.JsonRestore()}
        here = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=None, active_processes={here}, barrier_sync_key_prefix=f"process_{here}"
        )
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone) as reader:
            read = dict(reader.restore(folder, args=ocp.args.Composite(**items)).items())
        return ocp.args.Composite(**read if has_checks else {**read, "checks": None})

    def _verify(self, read: ocp.args.Composite) -> None:
        """Raises Damaged if something that was read is not what was saved."""
        if read.checks is None:
            return
        saved, found = read.checks.get("arrays", {}), array_fingerprints(read.state)
        wrong = [f"{name} is not as it was saved" for name in found if found[name] != saved.get(name)]
        if "data" in read and read.checks.get("data") != _digest(read.data):
            wrong.append("the position of the data is not as it was saved")
        if collectives.numbers_of_all(len(wrong)).any():
            raise Damaged("; ".join(wrong[:2]) + "; ..." * (len(wrong) > 2) or "another process read something else")

    def _or_explain(self, step: int, restore: Callable[[int], Any]) -> Any:
        try:
            return restore(step)
        except Damaged as error:
            raise UserError(self._explain(step, error, self._newest_whole(step, restore))) from error

    def _newest_whole(self, but: int, restore: Callable[[int], Any]) -> int | None:
        for step in reversed(self.steps()):
            with contextlib.suppress(Damaged):
                if step != but:
                    restore(step)
                    return step
        return None

    def _explain(self, step: int, reason: Damaged, whole: int | None) -> str:
        message = f"checkpoint {step} in {self._folder} is damaged, or of another model ({reason}); "
        if whole is None:
            return message + "none that is whole is left: correct the config, or start anew in another --workdir"
        return message + f"the newest whole one is {whole}: use it with --checkpoint {whole}"

    def _set_aside(self, step: int, reason: Damaged, whole: int) -> None:
        """Renames a damaged checkpoint."""
        if jax.process_index() == 0:
            aside = self._folder / f"{step}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            (self._folder / str(step)).rename(aside)
            warn(f"checkpoint {step} is damaged ({reason}) and now named {aside}; going on from checkpoint {whole}")
        collectives.sync(f"checkpoint {step} is set aside")
        self._manager.reload()

    def close(self) -> None:
        """Waits until everything is on disk."""
        with disk_errors(self._folder):
            self._manager.wait_until_finished()
            self._manager.close()


def _digest(position: dict) -> str:
    return hashlib.sha256(json.dumps(position, sort_keys=True).encode()).hexdigest()


def need_space(folder: Path, state: TrainState) -> None:
    """Raises UserError unless the disk, which all processes share, has room for the whole `state`, uncompressed."""
    needed, free = sum(x.nbytes for x in jax.tree.leaves(state)), shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"no space left for a checkpoint in {folder}: it takes {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are "
            "free; free some and run again to resume from the last one"
        )


@contextlib.contextmanager
def disk_errors(folder: Path):
    """For a disk that fills up meanwhile: one line says so; Orbax keeps the checkpoints before it whole."""
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise several kinds
        if "No space left" not in str(error) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"no space left for a checkpoint in {folder}: free some and run again to resume") from error
