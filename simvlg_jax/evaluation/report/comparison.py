"""What several runs scored on one split, and where two of them differ most."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from simvlg_jax.evaluation.report.page import tops_of
from simvlg_jax.evaluation.report.pictures import read_pictures
from simvlg_jax.evaluation.scores.bootstrap import interval

SHOWN = 24  # examples that changed most, of each split and pair of runs


@dataclass(frozen=True)
class Run:
    """The results of one run: `name` is unique among the runs, `look` its colour, see `charts.look`."""

    name: str
    look: str
    workdir: Path
    config: dict[str, object]
    splits: list[dict]

    def split(self, key: tuple[str, str]) -> dict | None:
        """Returns the values of a split with a given headline, see `key_of`, or None."""
        return next((split for split in self.splits if key_of(split) == key), None)


def key_of(split: dict) -> tuple[str, str]:
    """Name and headline: values of other headlines cannot be compared."""
    return split["name"], split["headline"]


class Comparison:
    """One split of the runs that have it.

    Attributes:
      name: of the split.
      headline: the score.
      columns: (run, its values of the split).
      top: the score that a full bar stands for.
      pairs: the first run with each other one.
    """

    def __init__(self, runs: list[Run], key: tuple[str, str]):
        self.name, self.headline = key
        self.columns = [(run, split) for run in runs if (split := run.split(key))]
        self.top = tops_of([split for _, split in self.columns])[self.headline]
        self.pairs = [Pair(self.columns[0], other) for other in self.columns[1:]]

    @property
    def scores(self) -> list[tuple[str, list[tuple[float | None, float | None]]]]:
        """(name of a score, (own, shuffled) of each run) of all scores."""
        names = dict.fromkeys(name for _, split in self.columns for name in split["scores"])
        return [
            (name, [(split["scores"].get(name), split["shuffled"].get(name)) for _, split in self.columns])
            for name in names
        ]

    @cached_property
    def pictures(self) -> dict[str, str]:
        """id -> `picture_text` of the cards: from the results, or else from the data of the first run."""
        held = {card["id"]: card["image"] for _, split in self.columns for card in split["gallery"]}
        rows = [card["own"] for pair in self.pairs for card in pair.cards if card["own"]["index"] is not None]
        missing = {row["index"]: row["id"] for row in rows if row["id"] not in held}
        return held | (read_pictures(self.columns[0][0].workdir, self.name, missing) if missing else {})


class Pair:
    """The first run and another one on the examples that both have: equal ids and references.

    Attributes:
      first: the first run.
      other: the other run.
      shared: number of examples that both have a score for.
      total: the greater number of examples, 0 for results without them.
      changed: number of shared examples with different texts.
      difference: mean of other - first over the shared examples, or None without any.
      interval: the 95 % interval of the difference, drawing shared examples again (paired bootstrap).
      cards: the examples that changed most, the greatest change first.
    """

    def __init__(self, first: tuple[Run, dict], other: tuple[Run, dict]):
        (self.first, before), (self.other, after) = first, other
        rows = {_identity(row): row for row in after["examples"] if row["score"] is not None}
        pairs = [
            (row, rows[_identity(row)])
            for row in before["examples"]
            if row["score"] is not None and _identity(row) in rows
        ]
        changes = [theirs["score"] - own["score"] for own, theirs in pairs]
        differing = [
            (change, own, theirs)
            for change, (own, theirs) in zip(changes, pairs, strict=True)
            if own["caption"] != theirs["caption"]
        ]
        self.shared, self.total = len(pairs), max(len(before["examples"]), len(after["examples"]))
        self.changed = len(differing)
        self.difference = sum(changes) / len(changes) if changes else None
        self.interval = interval(changes, seed=0) if changes else None
        self.cards = [
            {
                "place": place,
                "change": change,
                "own": own,
                "theirs": theirs,
                "words": f"{own['words']} {theirs['caption'].lower()}",
            }
            for place, (change, own, theirs) in enumerate(sorted(differing, key=lambda each: -abs(each[0]))[:SHOWN])
        ]


def _identity(row: dict) -> tuple:
    return row["id"], row["question"], *row["references"]
