"""Charts of scores and seconds over the number of visual tokens."""

from collections.abc import Sequence

from simvlg_jax.config.saved import CONNECTOR_MERGING
from simvlg_jax.evaluation.report.charts import Chart, Points, line_chart
from simvlg_jax.evaluation.report.comparison import Comparison
from simvlg_jax.evaluation.report.results import score_text


def token_charts(comparisons: Sequence[Comparison]) -> list[Chart]:
    """Returns the charts of each split of which the runs differ in their number of visual tokens."""
    return [chart for each in comparisons for chart in _charts(each) if chart]


def _charts(comparison: Comparison) -> list[Chart | None]:
    families = _families(comparison)
    if len({split["tokens"] for family in families.values() for split in family}) < 2:
        return []
    scores, seconds, intervals = {}, {}, {}
    for name, family in families.items():
        suffix = f", like {name}" if len(families) > 1 else ""
        scores[f"own picture{suffix}"] = _points(family, "score", 100)
        scores[f"shuffled{suffix}"] = _points(family, "control", 100)
        seconds[f"seconds{suffix}"] = _points(family, "seconds", 1)
        intervals[f"own picture{suffix}"] = [
            (split["tokens"], *(100 * end for end in split["interval"])) for split in family if split["interval"]
        ]
    unit = ", %" if score_text(comparison.headline, 0).endswith("%") else ""
    over = "visual tokens"
    titles = [f"{what} of {comparison.name} by {over}" for what in (comparison.headline, "Seconds per picture")]
    return [
        line_chart(titles[0] + unit, scores, over=over, from_zero=True, dotted=scores, intervals=intervals),
        line_chart(titles[1], seconds, over=over, from_zero=True, dotted=seconds),
    ]


def _families(comparison: Comparison) -> dict[str, list[dict]]:
    """Groups runs that differ in the merging of their connectors alone, which a line joins.

    Returns:
      name of a run of the group -> the values of its runs, those with few tokens first.
    """
    groups: dict[tuple, list[tuple[str, dict]]] = {}
    for run, split in comparison.columns:
        if split["tokens"]:
            rest = [(key, str(value)) for key, value in run.config.items() if key not in CONNECTOR_MERGING]
            groups.setdefault(tuple(rest) or (run.name,), []).append((run.name, split))
    return {
        group[0][0]: sorted((split for _, split in group), key=lambda split: split["tokens"])
        for group in groups.values()
    }


def _points(family: Sequence[dict], key: str, factor: float) -> Points:
    return [(split["tokens"], factor * split[key]) for split in family if split[key] is not None]
