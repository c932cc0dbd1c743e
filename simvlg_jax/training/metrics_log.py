"""What a run says while it goes: a progress bar or plain lines, metrics.jsonl, TensorBoard."""

import json
import os
import resource
import sys
import time
from pathlib import Path

import jax
import tensorboardX
from tqdm import tqdm

from simvlg_jax.utils import files

FILE = "metrics.jsonl"


class MetricsLog:
    """Writes metrics of process 0.

    Args:
      workdir: gets metrics.jsonl and tensorboard/.
      total: steps of the whole run; start: the step it begins at, lines of later steps are dropped.
    """

    def __init__(self, workdir: Path, total: int, start: int):
        self._quiet = jax.process_index() > 0
        if self._quiet:
            return
        self._path = workdir / FILE
        self._path.touch()  # a run without it has lost its scores
        _drop_after(self._path, start)
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
        self._bar = tqdm(total=total, initial=start, unit="step", disable=not shows_bars(), dynamic_ncols=True)
        self._started = time.monotonic()

    def write(self, step: int, kind: str, metrics: dict[str, float | str]) -> None:
        """One line for step `step`; kind is "train" or "eval"."""
        if self._quiet:
            return
        seconds = round(time.monotonic() - self._started, 2)
        with self._path.open("a") as file:  # closed each time: a mounted bucket keeps nothing of an open file
            file.write(json.dumps({"step": step, "kind": kind, **metrics, "seconds": seconds}) + "\n")
        numbers = {key: value for key, value in metrics.items() if isinstance(value, float)}
        for key, value in numbers.items():
            self._board.add_scalar(f"{metrics.get('split', kind)}/{key}", value, step)
        if kind == "train" and not self._bar.disable:
            self._bar.set_postfix(loss=f"{numbers['loss']:.3f}", img_s=f"{numbers['images_per_second']:.1f}")
        else:
            say(f"step {step}/{self._bar.total} " + " ".join(f"{k} {v:.4g}" for k, v in numbers.items()))

    def advance(self) -> None:
        if not self._quiet:
            self._bar.update()

    def close(self) -> None:
        if not self._quiet:
            self._bar.close()
            self._board.close()


def say(message: str) -> None:
    """Prints a line on standard error, above the progress bar if there is one; process 0 alone does."""
    if jax.process_index() == 0:
        tqdm.write(message, file=sys.stderr)


def _drop_after(path: Path, step: int) -> None:
    """Removes lines of steps that a resumed run will write again, and what is no record, such as a torn last line."""
    kept = [json.dumps(record) + "\n" for record in files.read_metrics(path) if record["step"] <= step]
    with files.atomic_write(path) as partial:
        partial.write_text("".join(kept))


def read_scores(workdir: Path) -> dict[int, float]:
    """Step -> score, of each evaluation that checkpoints are chosen by."""
    records = files.read_metrics(workdir / FILE)
    return {r["step"]: r["score"] for r in records if r.get("kind") == "eval" and isinstance(r.get("score"), float)}


def read_evaluated(workdir: Path) -> set[tuple[int, str]]:
    """(step, name) of each evaluation that the run has logged."""
    return {(r["step"], r.get("split")) for r in files.read_metrics(workdir / FILE) if r.get("kind") == "eval"}


def shows_bars() -> bool:
    """Whether standard error is a terminal that a progress bar fits into: some have no width."""
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def memory_gb() -> float:
    """Peak device memory in GB (10^9 bytes); on a CPU the peak resident memory of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
