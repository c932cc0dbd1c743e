"""Orbax checkpoints of a run: trained state and data position, saved asynchronously and verified when they are read.

All processes write one checkpoint into one folder. Any number of processes can read it.
"""

import ast
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
from flax import traverse_util
from orbax.checkpoint import checkpoint_managers as policies

from simvlg_jax.parallel import collectives
from simvlg_jax.training import former as former_layout
from simvlg_jax.training.fingerprints import array_fingerprints
from simvlg_jax.training.metrics_log import FILE, read_scores
from simvlg_jax.training.step import TrainState
from simvlg_jax.utils.errors import UserError, first_line, warn

RETRY_SECONDS = 1.0  # delay before a second attempt to read a checkpoint


class Damaged(Exception):
    """The checkpoint cannot be read, or its arrays differ from the saved ones. The message gives the reason."""


class Restored(NamedTuple):
    """The result of `Checkpoints.restore_newest`: the step, the sharded state and the position of the data."""

    step: int
    state: TrainState
    position: dict


@dataclass
class KeepBest:
    """Preserves the `n` checkpoints with the highest scores and those of `always`. Of equal scores the newest count.

    `scores` may gain entries during the run.
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
      workdir: holds checkpoints/ and the metrics log, whose scores determine the best checkpoint.
      keep_last: number of newest checkpoints to keep.
      best_by: the evaluation whose scores count.
      keep_best: number of checkpoints with the highest scores to keep in addition.
      read_only: only read; the folder must exist and nothing in it is changed.
    """

    def __init__(
        self, workdir: Path, keep_last: int = 1, keep_best: int = 0, best_by: str = "val", read_only: bool = False
    ):
        self._folder = (workdir / "checkpoints").resolve()
        self._scores = read_scores(workdir, best_by)
        unscored = frozenset(() if (workdir / FILE).exists() else self._existing_steps())
        if unscored and jax.process_index() == 0:
            warn(
                f"{workdir / FILE} is missing, so the best checkpoint is not known: the newest counts as the best, "
                "and training deletes none of the existing ones"
            )
        keep = [policies.LatestN(keep_last), KeepBest(self._scores, keep_best, unscored)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            # A final marker file commits a checkpoint: on a bucket, renaming a folder is many operations, not atomic.
            atomicity_options=ocp.options.AtomicityOptions(ocp.options.AtomicityMode.COMMIT_FILE),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
        )
        if read_only and not self._folder.is_dir():
            raise UserError(f"{workdir} holds no checkpoint; train with simvlg_jax.train first")
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def _existing_steps(self) -> list[int]:
        return [
            int(path.parent.name) for path in self._folder.glob("*/commit_success.txt") if path.parent.name.isdecimal()
        ]

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """Returns the newest saved step, or None."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Returns the step with the highest score, or the newest step if none has a score."""
        scored = [(self._scores[step], step) for step in self.steps() if step in self._scores]
        return max(scored)[1] if scored else self.latest()

    def choose(self, which: str) -> tuple[int, ...]:
        """Returns the steps that "best", "latest" or numbers such as "2000" or "1900,2000" name, the oldest first.

        Raises:
          UserError: there is no such checkpoint. The message lists the existing ones.
        """
        return tuple(sorted({self._choose(one.strip()) for one in which.split(",")}))

    def _choose(self, which: str) -> int:
        number = int(which) if which.isdecimal() else None
        step = {"best": self.best(), "latest": self.latest()}.get(which, number)
        if step not in self.steps():
            existing = ", ".join(map(str, self.steps())) or "none yet; train with simvlg_jax.train first"
            raise UserError(f"no checkpoint {which!r} in {self._folder}; there are {existing}")
        return step

    def save(self, step: int, state: TrainState, position: dict) -> None:
        """Starts saving in the background.

        Args:
          position: of the data iterator, taken before it draws the batch after `step`; the same on every process.

        Raises:
          UserError: no space is left. Nothing is written then, and older checkpoints stay whole.
        """
        self._scores.pop(step, None)  # the score of an earlier checkpoint of this step
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_present(state)),
            data=ocp.args.JsonSave(position),
            checks=ocp.args.JsonSave({"arrays": array_fingerprints(state), "data": _digest(position)}),
        )
        need_space(self._folder, state)
        with disk_errors(self._folder):
            if not self._manager.save(step, args=items):
                raise RuntimeError(f"checkpoint {step} was not saved: {self.latest()} exists already")

    def score(self, step: int, score: float) -> None:
        """Sets the score of a checkpoint. The metrics log stores it."""
        self._scores[step] = score

    def restore_newest(self, abstract: TrainState) -> Restored | None:
        """Restores the newest whole checkpoint in the shardings of `abstract`.

        Renames newer, damaged checkpoints to "STEP.damaged", with a warning, so that the run can save those steps anew.

        Returns:
          The restored checkpoint, or None if there are no checkpoints.

        Raises:
          UserError: there are checkpoints but none is whole. Nothing is renamed then.
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
        """Drops the scores of steps that the run will repeat."""
        for later in [s for s in self._scores if s > step]:
            del self._scores[later]

    def restore_params(self, step: int, abstract: dict) -> dict:
        """Restores only the trained parameters, or their moving average if the run has one, as `abstract` is sharded.

        Raises:
          UserError: the checkpoint is damaged. The message names the newest whole one.
        """
        return self._or_explain(step, lambda s: self._restore_params(s, abstract))

    def _restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict]:
        former = ("params", former_layout.NAME, "kernel") in self._saved_paths(step)
        target = _present(former_layout.to_former(abstract) if former else abstract)
        read = self._read(step, state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore())
        self._verify(read)
        state = TrainState(**read.state)
        return former_layout.to_current(state) if former else state, read.data

    def _restore_params(self, step: int, abstract: dict) -> dict:
        paths = self._saved_paths(step)
        former = ("params", former_layout.NAME, "kernel") in paths
        name = "average" if any(path[0] == "average" for path in paths) else "params"
        tree = {name: former_layout.to_former(abstract) if former else abstract}
        # Orbax would leave absent arrays as they are in `abstract`.
        if absent := ["/".join(path) for path in traverse_util.flatten_dict(tree) if paths and path not in paths]:
            raise Damaged(f"it has no {absent[0]}")
        arguments = ocp.args.PyTreeRestore(
            tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
        )
        read = self._read(step, state=arguments)
        self._verify(read)
        return former_layout.to_current(read.state[name]) if former else read.state[name]

    def _saved_paths(self, step: int) -> set[tuple[str, ...]]:
        """Returns the paths of the arrays of a checkpoint; none if its list of them cannot be read."""
        try:
            names = json.loads((self._folder / str(step) / "state" / "_METADATA").read_text())["tree_metadata"]
            return {tuple(ast.literal_eval(name)) for name in names}
        except (OSError, ValueError, KeyError, TypeError, SyntaxError):
            return set()

    def _read(self, step: int, **items: ocp.args.CheckpointArgs) -> ocp.args.Composite:
        """Returns the items of a checkpoint and its "checks", which are None in checkpoints of older versions.

        Raises:
          Damaged: two attempts to read failed on at least one process. Every process raises it.
        """
        for last in (False, True):
            reason = None
            try:
                read = self._read_alone(self._folder / str(step), items)
            except (jax.errors.JaxRuntimeError, MemoryError):  # too little memory, or a failed device
                raise
            except Exception as error:  # Orbax and TensorStore raise many types, including plain Exception
                reason = first_line(error)
            if not collectives.numbers_of_all(reason is not None).any():
                break
            if last:
                raise Damaged(reason or "another process cannot read its part")
            time.sleep(RETRY_SECONDS)  # a network disk may fail for a moment
        if read.checks is None and jax.process_index() == 0:
            warn(f"checkpoint {step} holds no checksums (an older version wrote it), so it is not verified")
        return read

    def _read_alone(self, folder: Path, items: dict[str, ocp.args.CheckpointArgs]) -> ocp.args.Composite:
        """Reads for this process only. It waits for no other process, so that an error in one blocks none."""
        saved_items = json.loads((folder / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
        if has_checks := "checks" in saved_items or (folder / "checks").exists():
            items = items | {"checks": ocp.args.JsonRestore()}
        here = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=None, active_processes={here}, barrier_sync_key_prefix=f"process_{here}"
        )
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone) as reader:
            read = dict(reader.restore(folder, args=ocp.args.Composite(**items)).items())
        return ocp.args.Composite(**read if has_checks else {**read, "checks": None})

    def _verify(self, read: ocp.args.Composite) -> None:
        """Raises Damaged if any array or the data position differs from what was saved."""
        if read.checks is None:
            return
        saved, found = read.checks.get("arrays", {}), array_fingerprints(read.state)
        wrong = [f"{name} is not as it was saved" for name in found if found[name] != saved.get(name)]
        if "data" in read and read.checks.get("data") != _digest(read.data):
            wrong.append("the position of the data is not as it was saved")
        if collectives.numbers_of_all(len(wrong)).any():
            raise Damaged("; ".join(wrong[:2]) + "; ..." * (len(wrong) > 2) or "another process found the damage")

    def _or_explain(self, step: int, restore: Callable[[int], Any]) -> Any:
        try:
            return restore(step)
        except Damaged as error:
            raise UserError(self._explain(step, error, self._newest_whole(step, restore))) from error

    def _newest_whole(self, except_for: int, restore: Callable[[int], Any]) -> int | None:
        for step in reversed(self.steps()):
            with contextlib.suppress(Damaged):
                if step != except_for:
                    restore(step)
                    return step
        return None

    def _explain(self, step: int, reason: Damaged, whole: int | None) -> str:
        message = f"checkpoint {step} in {self._folder} is damaged, or belongs to another model ({reason}); "
        if whole is None:
            return message + "no checkpoint is whole: correct the config, or start a new run in another --workdir"
        return message + f"the newest whole one is {whole}: use it with --checkpoint {whole}"

    def _set_aside(self, step: int, reason: Damaged, whole: int) -> None:
        """Renames a damaged checkpoint."""
        if jax.process_index() == 0:
            aside = self._folder / f"{step}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            (self._folder / str(step)).rename(aside)
            warn(f"checkpoint {step} is damaged ({reason}), renamed to {aside}; resuming from checkpoint {whole}")
        collectives.sync(f"checkpoint {step} is set aside")
        self._manager.reload()

    def close(self) -> None:
        """Waits until all checkpoints are on disk."""
        with disk_errors(self._folder):
            self._manager.wait_until_finished()
            self._manager.close()


def _present(state: TrainState) -> dict:
    """Returns the fields of a state that it has. Orbax would save None too, and ask for it when it restores."""
    return {name: tree for name, tree in vars(state).items() if tree is not None}


def _digest(position: dict) -> str:
    return hashlib.sha256(json.dumps(position, sort_keys=True).encode()).hexdigest()


def need_space(folder: Path, state: TrainState) -> None:
    """Raises UserError if the disk, which all processes share, has no room for the uncompressed global `state`."""
    needed, free = sum(x.nbytes for x in jax.tree.leaves(state)), shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"no space left for a checkpoint in {folder}: it takes {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are "
            "free; free some and run again to resume from the last one"
        )


@contextlib.contextmanager
def disk_errors(folder: Path):
    """Turns the errors of a full disk into a UserError. Orbax keeps the older checkpoints whole."""
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise several types
        if "No space left" not in str(error) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"no space left for a checkpoint in {folder}: free some and run again to resume") from error
