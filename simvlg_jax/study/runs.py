"""Trains and scores the runs of a comparison one after the other, each by the commands that a user would type."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from simvlg_jax.evaluation.report.results import results_files
from simvlg_jax.study.costs import Point, read_points
from simvlg_jax.study.plan import Arm, Study
from simvlg_jax.study.records import is_record_of, read_record, write_record
from simvlg_jax.utils.errors import UserError
from simvlg_jax.utils.files import read_metrics

Call = Callable[[str, Sequence[str]], None]


class Runs:
    """The runs of a comparison in a folder: runs/ARM/seed_N/stage_K, search/ARM/stage_K/rate, records/ARM_N.json.

    A run that has a record is done. The others go on where they were interrupted.

    Args:
      call: runs a verb with arguments, see `run_command`.
      say: prints a line.
    """

    def __init__(self, study: Study, workdir: Path, call: Call, say: Callable[[str], None]):
        self._study, self._workdir, self._call, self._say = study, workdir, call, say

    def all(self, after_each: Callable[[], object]) -> None:
        """Trains and scores what has no record yet. `after_each` is called when a run is recorded."""
        wanted = [(arm, seed) for seed in self._study.seeds for arm in self._study.arms]
        wanted = [(arm, seed) for arm, seed in wanted if not is_record_of(self._record(arm, seed), self._study, arm)]
        started = time.monotonic()
        for number, (arm, seed) in enumerate(wanted):
            left = ""
            if number:
                minutes = (time.monotonic() - started) / number * (len(wanted) - number) / 60
                left = f", about {minutes:.0f} minutes left"
            self._say(f"run {number + 1} of {len(wanted)}: {arm.name}, seed {seed}{left}")
            self._one(arm, seed)
            after_each()

    def _record(self, arm: Arm, seed: int) -> Path:
        return self._workdir / "records" / f"{arm.name}_{seed}.json"

    def _one(self, arm: Arm, seed: int) -> None:
        folder, points, chosen, previous = self._workdir / "runs" / arm.name / f"seed_{seed}", [], [], ""
        ends: list[Point] = []
        before = self._chosen_before(arm)
        for stage in range(len(arm.stages)):
            config = self._study.config(arm, stage)
            value = before[stage] if before else self._choose(arm, stage, previous)
            workdir = folder / f"stage_{stage + 1}"
            own = [f"--config.seed={seed}"] + ([] if value is None else [self._study.search.flag(value)])
            self._train(workdir, self._study.flags(arm, stage, previous), own)
            found = read_points(workdir, config.train.batch_size, config.train.best_by, ends[-1] if ends else None)
            if not found:
                raise UserError(f"{workdir} has no evaluation {config.train.best_by!r}: set evals.val.every", 2)
            # Scores of an earlier stage are of another kind; only its cost counts.
            points, ends, previous = found, [*ends, found[-1]], str(workdir)
            chosen.append(value)
        scores = self._score(arm, Path(previous), folder)
        write_record(self._record(arm, seed), self._study, arm, seed, chosen, ends, points, scores)

    def _train(self, workdir: Path, flags: list[str], own: list[str]) -> None:
        self._call("train", ["--config", self._study.base, "--workdir", str(workdir), *flags, *own])

    def _chosen_before(self, arm: Arm) -> list[float | None] | None:
        """Returns what the stages of an arm chose, if one of its runs has a record: another seed chooses the same."""
        paths = (self._record(arm, seed) for seed in self._study.seeds)
        found = (read_record(path)["chosen"] for path in paths if is_record_of(path, self._study, arm))
        return next(found, None)

    def _choose(self, arm: Arm, stage: int, previous: str) -> float | None:
        """Returns the value of the searched key with the lowest validation loss after a short run."""
        search = self._study.search
        if len(search.values) < 2:
            return search.values[0] if search.values else None
        config, losses = self._study.config(arm, stage), {}
        for value in search.values:
            workdir = self._workdir / "search" / arm.name / f"stage_{stage + 1}" / f"{value:g}"
            own = [f"--config.seed={self._study.seeds[0]}", search.flag(value), f"--config.train.steps={search.steps}"]
            records = _evaluations(workdir, config.train.best_by)
            if not records or records[-1]["step"] < search.steps:
                self._say(f"{arm.name}, stage {stage + 1}: {search.steps} steps with {search.key}={value:g}")
                self._train(workdir, self._study.flags(arm, stage, previous), own)
                records = _evaluations(workdir, config.train.best_by)
            losses[value] = records[-1]["loss"]
        return min(losses, key=losses.get)

    def _score(self, arm: Arm, workdir: Path, folder: Path) -> dict[str, Path]:
        """Scores the run's last stage; returns names of scores and their results files."""
        splits, found = self._study.splits, {}
        for tokens in (0, *arm.tokens):
            output = folder / "scores" / (f"{tokens}_tokens" if tokens else "own_tokens")
            given = [f"--config.connector.tokens={tokens}"] if tokens else []
            given += ["--split", ",".join(splits)] if splits else []
            for path in results_files(output):
                path.unlink()  # of an evaluation that was interrupted, perhaps of other splits
            self._call(
                "evaluate", ["--workdir", str(workdir), "--checkpoint", "latest", "--output", str(output), *given]
            )
            suffix = f", {tokens} tokens" if tokens else ""
            paths = [output / "eval" / f"{split}.json" for split in splits] or results_files(output)
            found |= {f"{path.stem}{suffix}": path for path in paths}
        return found


def _evaluations(workdir: Path, name: str) -> list[dict]:
    return [record for record in read_metrics(workdir / "metrics.jsonl") if record.get("split") == name]


def run_command(verb: str, arguments: Sequence[str]) -> None:
    """Runs `python -m simvlg_jax.VERB` in a process of its own.

    SIGTERM is passed on to it. Ctrl-C on a terminal reaches it by itself. Training then saves its run.

    Raises:
      UserError: it failed, and has printed why; the error has its status.
    """
    child = subprocess.Popen([sys.executable, "-m", f"simvlg_jax.{verb}", *arguments], stdout=subprocess.DEVNULL)
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, _: child.send_signal(number))}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda number, _: None)
    try:
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status:
        status = 128 - status if status < 0 else status
        raise UserError(f"simvlg_jax.{verb} ended with status {status}; the same command goes on from there", status)
