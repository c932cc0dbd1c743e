"""Orbax checkpoints of a run: trained state and data position, asynchronously.

Several processes write one checkpoint into one folder, and any other number of them reads it.
"""

import contextlib
import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from simvlg_jax.errors import UserError
from simvlg_jax.training.step import TrainState


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: holds checkpoints/.
      keep_last: newest checkpoints kept.
      keep_best: checkpoints kept by the highest score, beside the newest.
    """

    def __init__(self, workdir: Path, keep_last: int = 1, keep_best: int = 0, read_only: bool = False):
        folder = (workdir / "checkpoints").resolve()
        keep = [policies.LatestN(keep_last)]
        if keep_best:
            best = policies.BestN(
                get_metric_fn=lambda metrics: metrics["score"], n=keep_best, keep_checkpoints_without_metrics=False
            )
            keep.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            best_fn=lambda metrics: metrics["score"],
            # A checkpoint counts when its last file is there: renaming a folder is many operations on a bucket.
            atomicity_options=ocp.options.AtomicityOptions(ocp.options.AtomicityMode.COMMIT_FILE),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
        )
        if read_only and not folder.is_dir():
            raise UserError(f"{workdir} holds no checkpoint; train with simvlg_jax.train first")
        self._manager = ocp.CheckpointManager(folder, options=options)

    def latest(self) -> int | None:
        """Newest step saved, or None."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step with the highest score, else the newest."""
        return self._manager.best_step() or self._manager.latest_step()

    def save(self, step: int, state: TrainState, position: dict, score: float | None) -> None:
        """Starts saving in the background.

        Args:
          position: where the data iterator stood before it drew the batch after `step`; the same on every process.

        Raises:
          UserError: no space for it; nothing is written then, and what was saved before stays whole.
        """
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(position))
        metrics = None if score is None else {"score": float(score)}
        need_space(Path(self._manager.directory), state)
        with disk_errors(self._manager.directory):
            self._manager.save(step, args=items, metrics=metrics)

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict]:
        """State in the shardings of `abstract`, and the position of the data."""
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        restored = self._restore(step, items)
        return restored["state"], restored["data"]

    def restore_params(self, step: int, abstract: dict) -> dict:
        """The trained parameters alone, in the shardings of `abstract`."""
        handler = ocp.args.PyTreeRestore(
            {"params": abstract},
            restore_args=ocp.checkpoint_utils.construct_restore_args({"params": abstract}),
            partial_restore=True,
        )
        return self._restore(step, ocp.args.Composite(state=handler))["state"]["params"]

    def _restore(self, step: int, items: ocp.args.Composite):
        try:
            return self._manager.restore(step, args=items)
        except (ValueError, OSError, KeyError) as error:
            raise UserError(
                f"cannot read checkpoint {step} ({type(error).__name__}: {str(error).splitlines()[0]}); if it is "
                f"damaged, delete {self._manager.directory / str(step)} and the one before it is used"
            ) from error

    def close(self) -> None:
        """Waits until everything is on disk."""
        with disk_errors(self._manager.directory):
            self._manager.wait_until_finished()
            self._manager.close()


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
