"""Charts of scores and seconds over the number of visual tokens."""

from collections.abc import Sequence

from simvlg_jax.config.saved import MERGING
from simvlg_jax.evaluation.report.charts import Chart, line_chart
from simvlg_jax.evaluation.report.comparison import Comparison, Run
from simvlg_jax.evaluation.report.results import score_text


def token_charts(comparisons: Sequence[Comparison]) -> list[Chart]:
    """Score and seconds over the number of visual tokens, if it differs; a line joins runs that differ only in it."""
    made = []
    for each in comparisons:
        columns = sorted(
            ((run, split) for run, split in each.columns if split["tokens"]), key=lambda column: column[1]["tokens"]
        )
        if len({split["tokens"] for _, split in columns}) < 2:
            continue
        families: dict[tuple, list[tuple[Run, dict]]] = {}
        for run, split in columns:
            rest = tuple((key, str(value)) for key, value in run.config.items() if key not in MERGING)
            families.setdefault(rest, []).append((run, split))
        scores, seconds, intervals = {}, {}, {}
        for family in families.values():
            name = f"like {family[0][0].name}" if len(families) > 1 else ""
            own, control = (f"{what}, {name}" if name else what for what in ("own picture", "shuffled"))
            scores[own] = [(split["tokens"], 100 * split["score"]) for _, split in family]
            scores[control] = [
                (split["tokens"], 100 * split["control"]) for _, split in family if split["control"] is not None
            ]
            intervals[own] = [
                (split["tokens"], *(100 * end for end in split["interval"])) for _, split in family if split["interval"]
            ]
            seconds[name or "seconds per picture"] = [
                (split["tokens"], split["seconds"]) for _, split in family if split["seconds"] is not None
            ]
        unit = ", %" if score_text(each.headline, 0).endswith("%") else ""
        style = dict(over="visual tokens", from_zero=True)
        made += [
            line_chart(
                f"{each.headline} of {each.name} by visual tokens{unit}",
                scores,
                dotted=scores,
                intervals=intervals,
                **style,
            ),
            line_chart(f"Seconds per picture of {each.name} by visual tokens", seconds, dotted=seconds, **style),
        ]
    return [chart for chart in made if chart]
