"""Geometry of small line charts. The template of the report draws them as SVG, styled by its style sheet."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

WIDTH, HEIGHT = 560, 230  # of the whole drawing, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 10, 26  # margins for the labels of the axes
_MAX_POINTS = 300  # longer series are averaged down to at most this many points
_MAX_DOTS = 60
_COLOURS = 8  # of the style sheet

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
      name: in the legend.
      look: the class of its colour: "faint", or that of `look`.
      path: its SVG path.
      bars: the SVG path of its intervals.
      dots: its points (x, y), if they are drawn.
      last: its last value as text.
    """

    name: str
    look: str
    path: str
    bars: str
    dots: list[tuple[float, float]]
    last: str


@dataclass(frozen=True)
class Chart:
    """Lines over what `over` names, from 0. Ticks are (position, label) in SVG units."""

    title: str
    over: str
    series: list[Series]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def line_chart(
    title: str,
    lines: Mapping[str, Points],
    *,
    over: str = "steps",
    from_zero: bool = False,
    faint: Collection[str] = (),
    dotted: Collection[str] = (),
    intervals: Mapping[str, Sequence[tuple[float, float, float]]] = MappingProxyType({}),
) -> Chart | None:
    """Returns a chart without the non-finite values, or None if no value is finite.

    Args:
      title: of the chart.
      lines: {name: [(x, value)]}. A name keeps the number of its colour, whether or not the others have values.
      over: what x is.
      from_zero: whether the axis of values begins at 0.
      faint: names of lines that are drawn in grey.
      dotted: names of lines whose points are drawn, if they are few.
      intervals: {name: [(x, low, high)]} around points of these lines.
    """
    shown = [name for name in lines if name not in faint]
    looks = {name: look(number) for number, name in enumerate(shown, 1)} | dict.fromkeys(faint, "faint")
    finite = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in lines.items()}
    finite = {name: _thinned(points) for name, points in finite.items() if points}
    if not finite:
        return None
    xs = [x for points in finite.values() for x, _ in points]
    ys = [y for points in finite.values() for _, y in points]
    ys += [y for bars in intervals.values() for _, low, high in bars for y in (low, high)]
    y_ticks = ticks(0.0 if from_zero else min(ys), max(ys))
    x_high = max(*xs, 1)
    y_low, y_high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def place_x(x: float) -> float:
        return round(LEFT + x / x_high * (WIDTH - LEFT - RIGHT), 1)

    def place_y(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    series = []
    for name, points in finite.items():
        placed = [(place_x(x), place_y(y)) for x, y in points]
        path = "M" + "L".join(f"{x} {y}" for x, y in placed)
        bars = "".join(f"M{place_x(x)} {place_y(low)}V{place_y(high)}" for x, low, high in intervals.get(name, ()))
        dots = placed if name in dotted and len(placed) <= _MAX_DOTS else []
        series.append(Series(name, looks[name], path, bars, dots, f"{points[-1][1]:.3g}"))
    return Chart(
        title,
        over,
        series,
        [(place_x(x), f"{x:,.0f}") for x in ticks(0, x_high) if x <= x_high],
        [(place_y(y), f"{y:g}") for y in y_ticks],
    )


def look(number: int) -> str:
    """Returns the classes of the line of a number, from 1 on. After the last colour, lines are dashed."""
    return f"line-{(number - 1) % _COLOURS + 1}" + (" dashed" if number > _COLOURS else "")


def smoothed(points: Points) -> list[tuple[float, float]]:
    """Returns the bias-corrected exponential moving average of the finite values, over about 1/30 of the points."""
    weight = 1 - 1 / max(len(points) / 30, 1)
    result, total, norm = [], 0.0, 0.0
    for x, y in points:
        if math.isfinite(y):
            total, norm = weight * total + (1 - weight) * y, weight * norm + (1 - weight)
            result.append((x, total / norm))
    return result


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about `count` round values that span [low, high], in steps of 1, 2 or 5 times a power of ten."""
    size = max(abs(low), abs(high))
    if high - low <= max(1e-9 * size, 1e-30):  # a flat line gets room around it
        low, high = low - (size * 0.1 or 0.5), high + (size * 0.1 or 0.5)
    rough = (high - low) / (count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _thinned(points: Points) -> list[tuple[float, float]]:
    stride = -(-len(points) // _MAX_POINTS)
    chunks = [points[i : i + stride] for i in range(0, len(points), stride)]
    return [(chunk[-1][0], sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]
