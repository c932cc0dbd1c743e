"""What a run cost up to each of its evaluations, from its metrics.jsonl."""

from pathlib import Path
from typing import NamedTuple

from simvlg_jax.utils.files import read_metrics


class Point(NamedTuple):
    """A run at one of its evaluations.

    Attributes:
      images: examples seen.
      seconds: spent on training alone: neither on evaluations nor on starting.
      tflop: 10^12 FLOPs of the matrix products of all steps, frozen parts included.
      score, loss: of the evaluation; None if it has none.
    """

    images: float
    seconds: float
    tflop: float
    score: float | None
    loss: float | None


def read_points(workdir: Path, batch_size: int, evaluation: str, before: Point | None = None) -> list[Point]:
    """Returns a point for each evaluation of that name.

    A resumed run may have lost the log line of some steps; they count with the speed of the next line.

    Args:
      before: the last point of an earlier stage, whose cost is added.
    """
    images, seconds, tflop = before[:3] if before else (0.0, 0.0, 0.0)
    step, per_image = 0, (0.0, 0.0)  # seconds and TFLOP of an example, in the last line
    points = []
    for record in read_metrics(workdir / "metrics.jsonl"):
        seen = (record["step"] - step) * batch_size
        if record.get("kind") == "train":
            per_image = 1 / record["images_per_second"], record["tflops"] / record["images_per_second"]
            step, images = record["step"], images + seen
            seconds, tflop = seconds + seen * per_image[0], tflop + seen * per_image[1]
        elif record.get("split") == evaluation:
            cost = images + seen, seconds + seen * per_image[0], tflop + seen * per_image[1]
            points.append(Point(*cost, record.get("score"), record.get("loss")))
    return points


def reached(points: list[Point], score: float, cost: str) -> float | None:
    """Returns the cost (a field of `Point`) at which the score is first reached, or None if it never is.

    Between two evaluations the score is taken to be linear in the cost.
    """
    before = None
    for point in points:
        if point.score is not None:
            if point.score >= score:
                if before is None:
                    return getattr(point, cost)
                share = (score - before.score) / (point.score - before.score)
                return getattr(before, cost) + share * (getattr(point, cost) - getattr(before, cost))
            before = point
    return None
