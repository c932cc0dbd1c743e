"""Logs of a run: a progress bar or plain lines, metrics.jsonl and TensorBoard."""

import json
import os
import resource
import sys
import time
from pathlib import Path

import jax
from tqdm import tqdm

from simvlg_jax.utils import files

FILE = "metrics.jsonl"


class MetricsLog:
    """Writes the metrics. Only process 0 writes; on other processes all methods do nothing.

    Args:
      workdir: gets metrics.jsonl and tensorboard/.
      total: number of steps of the whole run.
      start: the step that the run starts or resumes at. Lines of later steps are dropped.
    """

    def __init__(self, workdir: Path, total: int, start: int):
        self._quiet = jax.process_index() > 0
        if self._quiet:
            return
        self._path = workdir / FILE
        self._path.touch()  # if it is missing later, the scores are lost, which `Checkpoints` warns about
        _drop_after(self._path, start)
        self._board = _summary_writer(workdir / "tensorboard", start + 1)
        self._bar = tqdm(total=total, initial=start, unit="step", disable=not shows_bars(), dynamic_ncols=True)
        self._started = time.monotonic()

    def write(self, step: int, kind: str, metrics: dict[str, float | str]) -> None:
        """Writes one line for a step; `kind` is "train" or "eval"."""
        if self._quiet:
            return
        seconds = round(time.monotonic() - self._started, 2)
        with self._path.open("a") as file:  # closed after each line, since a mounted bucket only stores closed files
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


def _summary_writer(folder: Path, purge_step: int):
    """Returns a tensorboardX.SummaryWriter without importing PyTorch.

    tensorboardX imports PyTorch where it is installed, which takes seconds and is of no use here.
    """
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # its import fails, which tensorboardX expects
    try:
        import tensorboardX
    finally:
        if hide:
            del sys.modules["torch"]
    return tensorboardX.SummaryWriter(str(folder), purge_step=purge_step)


def say(message: str) -> None:
    """Prints a line on standard error, above the progress bar if there is one. Only process 0 prints."""
    if jax.process_index() == 0:
        tqdm.write(message, file=sys.stderr)


def _drop_after(path: Path, step: int) -> None:
    """Removes lines of steps that a resumed run repeats, and invalid lines such as a truncated last one."""
    kept = [json.dumps(record) + "\n" for record in files.read_metrics(path) if record["step"] <= step]
    with files.atomic_write(path) as partial:
        partial.write_text("".join(kept))


def read_scores(workdir: Path, evaluation: str) -> dict[int, float]:
    """Returns step -> score of the evaluation of that name."""
    records = [
        r for r in files.read_metrics(workdir / FILE) if r.get("kind") == "eval" and r.get("split") == evaluation
    ]
    return {r["step"]: r["score"] for r in records if isinstance(r.get("score"), float)}


def read_evaluated(workdir: Path) -> set[tuple[int, str]]:
    """Returns (step, name) of each evaluation that the run has logged."""
    return {(r["step"], r.get("split")) for r in files.read_metrics(workdir / FILE) if r.get("kind") == "eval"}


def shows_bars() -> bool:
    """Returns whether standard error is a terminal with room for a progress bar: some terminals report no width."""
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def memory_gb() -> float:
    """Returns the peak device memory in GB (10^9 bytes); on a CPU the peak resident memory of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
