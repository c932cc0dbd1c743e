"""The curves of a run's metrics.jsonl, and those of several runs over each other."""

from collections.abc import Mapping
from pathlib import Path

from simvlg_jax.evaluation.report.charts import Chart, Points, line_chart, smoothed
from simvlg_jax.utils.files import read_metrics

# title -> (kind of record, key, factor): drawn for several runs
_COMPARED = {
    "Training loss, smoothed": ("train", "loss", 1),
    "Validation loss": ("eval", "loss", 1),
    "Validation CIDEr": ("eval", "CIDEr", 100),
    "Validation accuracy, %": ("eval", "accuracy", 100),
    "Retrieval on validation pictures, R@1, %": ("eval", "R@1", 100),
    "Pictures per second": ("train", "images_per_second", 1),
}


def curves(workdir: Path, best_by: str) -> list[Chart]:
    """Returns the charts that the metrics of a captioning or contrastive run have values for.

    Args:
      workdir: of the run.
      best_by: name of the evaluation that is drawn.
    """
    records = _records(workdir, best_by)

    def points(kind: str, key: str, factor: float = 1) -> Points:
        return _points(records, kind, key, factor)

    loss = points("train", "loss")
    made = [
        line_chart(
            "Loss",
            {"each step": loss, "smoothed": smoothed(loss), "validation": points("eval", "loss")},
            faint={"each step"},
            dotted={"validation"},
        ),
        line_chart(
            "Validation CIDEr",
            {"own picture": points("eval", "CIDEr", 100), "shuffled": points("eval", "CIDEr_shuffled", 100)},
            from_zero=True,
            dotted={"own picture", "shuffled"},
        ),
        line_chart(
            "Retrieval on validation pictures, %",
            {"R@1": points("eval", "R@1", 100), "R@5": points("eval", "R@5", 100)},
            from_zero=True,
            dotted={"R@1", "R@5"},
        ),
        line_chart("Learning rate", {"learning rate": points("train", "lr")}, from_zero=True),
        line_chart("Pictures per second", {"training": points("train", "images_per_second")}, from_zero=True),
    ]
    return [chart for chart in made if chart]


def compared_curves(runs: Mapping[str, tuple[Path, str]]) -> list[Chart]:
    """Returns a chart for each metric that a run has values for, with a line for each run.

    Args:
      runs: name -> workdir, and the evaluation that is drawn.
    """
    records = {name: _records(*run) for name, run in runs.items()}
    made = []
    for title, (kind, key, factor) in _COMPARED.items():
        lines = {name: _points(own, kind, key, factor) for name, own in records.items()}
        if kind == "train":
            lines = {name: smoothed(points) for name, points in lines.items()}
        dotted = lines if kind == "eval" else ()
        made.append(line_chart(title, lines, from_zero=key != "loss", dotted=dotted))
    return [chart for chart in made if chart]


def _records(workdir: Path, best_by: str) -> list[dict]:
    return [record for record in read_metrics(workdir / "metrics.jsonl") if record.get("split", best_by) == best_by]


def _points(records: list[dict], kind: str, key: str, factor: float) -> Points:
    chosen = [r for r in records if r.get("kind") == kind and isinstance(r.get(key), int | float)]
    return [(r["step"], r[key] * factor) for r in chosen]
