"""Writes one page that compares the results of several runs: scores, settings, curves and what they wrote."""

from collections.abc import Sequence
from pathlib import Path

from simvlg_jax.evaluation.report.charts import look
from simvlg_jax.evaluation.report.comparison import Comparison, Run, key_of
from simvlg_jax.evaluation.report.curves import compared_curves
from simvlg_jax.evaluation.report.page import default_config, render, write_page
from simvlg_jax.evaluation.report.results import read_config, read_splits
from simvlg_jax.evaluation.report.token_charts import token_charts
from simvlg_jax.utils.errors import UserError


def write_comparison(workdirs: Sequence[Path], output: Path) -> Path:
    """Writes the page atomically and returns its path.

    Raises:
      UserError: fewer than two runs, a folder without results, or no split that two runs have in common.
    """
    runs = _read_runs(workdirs)
    keys = list(dict.fromkeys(key_of(split) for run in runs for split in run.splits))
    shared = [key for key in keys if sum(run.split(key) is not None for run in runs) > 1]
    if not shared:
        held = [", ".join(f"{name} ({score})" for name, score in map(key_of, run.splits)) for run in runs]
        raise UserError(
            "these runs have no split in common that is scored in the same way; evaluate one with --split:\n  "
            + "\n  ".join(f"{run.name}: {splits}" for run, splits in zip(runs, held, strict=True)),
            2,
        )
    comparisons = [Comparison(runs, key) for key in shared]
    content = render(
        "compare.html.j2",
        runs=runs,
        comparisons=comparisons,
        left_out=[(key, run) for key in keys if key not in shared for run in runs if run.split(key)],
        configured=[run for run in runs if run.config],
        settings=_settings(runs),
        tokens=token_charts(comparisons),
        curves=compared_curves({run.name: (run.workdir, run.config.get("train.best_by", "val")) for run in runs}),
        openmoji=any(run.config.get("data.name") == "openmoji" for run in runs),
    )
    return write_page(output, content)


def _read_runs(workdirs: Sequence[Path]) -> list[Run]:
    if len(workdirs) < 2:
        raise UserError("there is nothing to compare with only one run; name two folders or more", 2)
    if len({workdir.resolve() for workdir in workdirs}) < len(workdirs):
        raise UserError("a run is named twice; name each folder once", 2)
    names = [workdir.resolve().name for workdir in workdirs]
    runs = []
    for number, (workdir, name) in enumerate(zip(workdirs, names, strict=True), 1):
        splits = [split for split in read_splits(workdir) if split["score"] is not None]
        if not splits:
            raise UserError(f"{workdir} holds no results (eval/*.json); write them with simvlg_jax.evaluate", 2)
        name = name if names.count(name) == 1 else str(workdir)
        runs.append(Run(name, look(number), workdir, read_config(workdir), splits))
    return runs


def _settings(runs: list[Run]) -> list[tuple[str, list[object]]]:
    """(key, value of each run) of the keys that differ. A run that is older than a key has its default."""
    usual = default_config()
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = [(key, [run.config.get(key, usual.get(key, "none")) for run in runs if run.config]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]
