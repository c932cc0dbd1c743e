"""What the records of a comparison say: for each arm means over its seeds, and its cost up to the baseline's score."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simvlg_jax.study.costs import Point, reached
from simvlg_jax.study.plan import Study
from simvlg_jax.study.records import is_record_of, read_record

COSTS = {"seconds": "seconds of training", "tflop": "TFLOP", "images": "examples"}


@dataclass(frozen=True)
class Spread:
    """Mean, least and greatest of one number over the seeds; `count` of them have it."""

    mean: float
    low: float
    high: float
    count: int


def spread(values: Sequence[float | None]) -> Spread | None:
    """Returns the spread of those that are not None; None if all are."""
    known = [value for value in values if value is not None]
    return Spread(statistics.fmean(known), min(known), max(known), len(known)) if known else None


@dataclass(frozen=True)
class ArmSummary:
    """All runs of an arm.

    Attributes:
      records: of its seeds, see `records.write_record`.
      scores: name of a score -> its headline value over the seeds, and against shuffled pictures.
      total: name of a cost (`COSTS`) -> the whole run's.
      reached: name of a cost -> the cost up to the baseline's score, of the seeds that reach it; None if none does.
      mean_curve: the mean of the runs at each evaluation. It has as many points as the shortest of them.
    """

    name: str
    records: list[dict]
    scores: dict[str, tuple[Spread | None, Spread | None]]
    total: dict[str, Spread]
    reached: dict[str, Spread | None]
    mean_curve: list[Point]

    def as_dict(self) -> dict:
        """Returns every number, for JSON."""
        return {
            "scores": {
                name: {"own": _dict(own), "shuffled": _dict(other)} for name, (own, other) in self.scores.items()
            },
            "total": {name: _dict(value) for name, value in self.total.items()},
            "up_to_the_baselines_score": {name: _dict(value) for name, value in self.reached.items()},
            "mean_curve": [point._asdict() for point in self.mean_curve],
            "records": [record | {"curve": [point._asdict() for point in record["curve"]]} for record in self.records],
        }


def _dict(value: Spread | None) -> dict | None:
    return vars(value) if value else None


@dataclass(frozen=True)
class Summary:
    """A comparison: its arms, and the score on validation that they are timed to (None without a baseline)."""

    baseline: str
    target: float | None
    arms: list[ArmSummary]


def summarise(study: Study, workdir: Path) -> Summary:
    """Returns the summary of all records that there are; arms without any are left out."""
    found = {}
    for arm in study.arms:
        paths = [workdir / "records" / f"{arm.name}_{seed}.json" for seed in study.seeds]
        records = [read_record(path) for path in paths if is_record_of(path, study, arm)]
        if records:
            found[arm.name] = records
    target = None
    if study.baseline in found:
        ends = [record["curve"][-1].score for record in found[study.baseline]]
        target = None if None in ends else statistics.fmean(ends)
    return Summary(study.baseline, target, [_arm(name, records, target) for name, records in found.items()])


def _arm(name: str, records: list[dict], target: float | None) -> ArmSummary:
    curves = [record["curve"] for record in records]
    names = records[0]["scores"]
    return ArmSummary(
        name,
        records,
        {each: tuple(spread([_headline(r["scores"][each], of) for r in records]) for of in _SCORES) for each in names},
        {cost: spread([getattr(curve[-1], cost) for curve in curves]) for cost in COSTS},
        {cost: None if target is None else spread([reached(c, target, cost) for c in curves]) for cost in COSTS},
        [Point(*map(_mean, zip(*points, strict=True))) for points in zip(*curves, strict=False)],
    )


_SCORES = ("scores", "shuffled")


def _headline(result: dict, of: str) -> float | None:
    return (result[of] or {}).get(result["headline"])


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else statistics.fmean(values)
