"""Writes what a comparison found: compare.html, a chart of each cost as SVG, and compare.json with every number."""

from collections.abc import Sequence
from pathlib import Path

from simvlg_jax.evaluation.report.charts import Chart, line_chart
from simvlg_jax.evaluation.report.page import render, write_page
from simvlg_jax.study.plan import Study
from simvlg_jax.study.summary import COSTS, ArmSummary, Spread, Summary, summarise
from simvlg_jax.utils.files import write_json


def write_results(study: Study, workdir: Path) -> Path:
    """Writes the results of all recorded runs and returns the path of the page."""
    summary = summarise(study, workdir)
    charts = {cost: chart for cost, name in COSTS.items() if (chart := _chart(summary, cost, name))}
    for cost, chart in charts.items():
        write_page(workdir / f"score_by_{cost}.svg", render("chart.svg.j2", package=__package__, c=chart))
    write_json(
        workdir / "compare.json",
        {
            "baseline": summary.baseline,
            "baseline_validation_score": summary.target,
            "seeds": list(study.seeds),
            "arms": {arm.name: arm.as_dict() for arm in summary.arms},
        },
    )
    texts = dict(text=text, cost=cost_text, chosen=chosen_text)
    done = sum(len(arm.records) for arm in summary.arms)
    page = dict(study=study, summary=summary, done=done, charts=charts.values(), **texts)
    content = render("study.html.j2", package=__package__, **page)
    return write_page(workdir / "compare.html", content)


def _chart(summary: Summary, cost: str, name: str) -> Chart | None:
    lines, bars = {}, {}
    for arm in summary.arms:
        points = [(getattr(point, cost), 100 * point.score) for point in arm.mean_curve if point.score is not None]
        lines[arm.name], bars[arm.name] = points, _bars(arm, [x for x, _ in points])
    return line_chart(f"Validation score by {name}", lines, over=name, from_zero=True, dotted=lines, intervals=bars)


def _bars(arm: ArmSummary, places: list[float]) -> list[tuple[float, float, float]]:
    """Returns (x, least, greatest score over the seeds) at each point of the mean curve."""
    curves = [record["curve"] for record in arm.records]
    together = [points for points in zip(*curves, strict=False) if all(point.score is not None for point in points)]
    scores = [[100 * point.score for point in points] for points in together]
    return [(x, min(each), max(each)) for x, each in zip(places, scores, strict=False)]


def text(value: Spread | None, factor: float = 1.0, digits: int = 1) -> str:
    """Returns "mean (low to high)", or the mean alone of one seed; "none" for None."""
    if value is None:
        return "none"
    mean, low, high = (f"{factor * each:,.{digits}f}" for each in (value.mean, value.low, value.high))
    return mean if value.count == 1 else f"{mean} ({low} to {high})"


def cost_text(value: Spread | None, seeds: int) -> str:
    """Returns the cost up to a score as text, with the number of seeds that reach it."""
    if value is None:
        return "not reached"
    return text(value, digits=0) + ("" if value.count == seeds else f", {value.count} of {seeds} seeds")


def chosen_text(values: Sequence[float], chosen: float) -> str:
    """Returns the chosen value, and whether it is at an edge of the search, so that a better one may lie outside."""
    edge = {min(values): ", the least", max(values): ", the greatest"} if len(values) > 1 else {}
    return f"{chosen:g}{edge.get(chosen, '')}"
