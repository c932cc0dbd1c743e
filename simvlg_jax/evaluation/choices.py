"""Evaluates a model that chooses among given answers: the likeliest one is its answer (multiple choice)."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simvlg_jax.config.check import lookup
from simvlg_jax.data.sources import RecordInfo
from simvlg_jax.evaluation.batches import Found, described, skipped_of, through_batches
from simvlg_jax.evaluation.evaluator import EvalData, Result
from simvlg_jax.evaluation.gallery import Gallery
from simvlg_jax.evaluation.groups import by_group
from simvlg_jax.evaluation.likelihood import Likely, Query, likelihood_of
from simvlg_jax.evaluation.partial import Partial
from simvlg_jax.evaluation.scores.answers import ACCURACIES
from simvlg_jax.evaluation.scores.bootstrap import interval
from simvlg_jax.evaluation.submissions import OF_METRIC
from simvlg_jax.evaluation.written import Written
from simvlg_jax.parallel.collectives import gather
from simvlg_jax.tasks.task import Task
from simvlg_jax.utils.errors import UserError
from simvlg_jax.utils.progress import SILENT, Announcer

RANKINGS = {"sum": lambda likely: likely.nats, "mean": lambda likely: likely.nats / max(likely.tokens, 1)}
ANSWERS, SEPARATOR = "answers", "|"  # in evals.NAME.choices
KEPT = 10  # choices of an example in the results, the likeliest ones


class Choices:
    """Scores the likeliest of the choices of each record; the score is the share of right ones.

    A choice is right if the source says that it is, or else by the accuracy that `evals.NAME.metric` names, between it
    and the answers. The control chooses with the picture of another record.
    """

    def __init__(self, name: str, entry: ConfigDict, task: Task, config: ConfigDict, mesh: Mesh):
        if not task.captions:
            raise UserError(f"evals.{name}: a model of this task has no language model; set another type", 2)
        self.name, self.every, self._seed = name, entry.every, config.seed
        metric = entry.metric or "exact"
        self._accuracy = lookup(ACCURACIES, f"evals.{name}.metric", metric)
        self._files = OF_METRIC[metric]
        self._rank = lookup(RANKINGS, f"evals.{name}.ranking", entry.ranking)
        self.data = EvalData(entry, task, config, mesh)
        self._common = common_choices(name, entry.choices, self.data)
        encoder = task.batch.texts["caption"].encoder
        self._likelihood = likelihood_of(task.model, encoder, self.data.batch_size, mesh=mesh)
        self._gallery = Gallery(self.data, task, config.seed)

    def __call__(self, params: dict, announce: Announcer = SILENT, partial: Partial | None = None) -> Result:
        found = through_batches(
            self.name, self.data, announce, partial, lambda arrays, number: self._batch(params, arrays)
        )
        shown = self._gallery(params, [example["index"] for example in found.examples]) if partial else {}
        written = Written(None, found.examples, found.unreadable)
        return score(found, written, shown, self._seed)._replace(files=self._files(written.texts()))

    def _batch(self, params: dict, arrays: dict[str, jax.Array]) -> dict:
        """JSON of a batch, as `through_batches` takes it, and the scores of the choices with other pictures."""
        prefixes = self._likelihood.encode(params, arrays["image"])
        indices, skipped = gather(arrays["index"]).tolist(), gather(arrays["skipped"]).tolist()
        rows = [row for row, index in enumerate(indices) if index >= 0 and not skipped[row]]
        infos = [self.data.source.info(indices[row]) for row in rows]
        choices = [self._common or info.extras.choices for info in infos]

        def likely(pictures: list[int]) -> list[list[Likely]]:
            queries = [
                Query(picture, info.prompt, text)
                for picture, info, texts in zip(pictures, infos, choices, strict=True)
                for text in texts
            ]
            found = iter(self._likelihood(params, prefixes, queries))
            return [[next(found) for _ in texts] for texts in choices]

        examples, others = [], []
        for row, info, texts, own in zip(rows, infos, choices, likely(rows), strict=True):
            examples.append({**described(indices[row], info), **self._example(info, texts, own)})
        if len(rows) > 1:
            for info, texts, other in zip(infos, choices, likely([*rows[1:], rows[0]]), strict=True):
                others.append(self._right(info, texts, self._order(other)[0]))
        return {
            "examples": examples,
            "skipped": skipped_of(indices, skipped),
            "shuffled": [right for right in others if right is not None],
        }

    def _order(self, likely: list[Likely]) -> list[int]:
        """Places of the choices, the likeliest first, and of equal ones the first."""
        return sorted(range(len(likely)), key=lambda place: -self._rank(likely[place]))

    def _right(self, info: RecordInfo, choices: Sequence[str], place: int) -> float | None:
        """How right a choice is; None if the record has no answer."""
        if not self._common and info.extras.correct is not None:
            return float(place == info.extras.correct)
        return self._accuracy(choices[place], info.references) if info.references else None

    def _example(self, info: RecordInfo, choices: Sequence[str], likely: list[Likely]) -> dict:
        """The part of an example that depends on the choices."""
        order = self._order(likely)
        known = not self._common and info.extras.correct is not None
        right = [self._right(info, choices, place) for place in range(len(choices))]
        return {
            "references": [choices[info.extras.correct]] if known else list(info.references),
            "caption": choices[order[0]],
            "loss": None,
            "choices": [[choices[place], likely[place].nats, likely[place].tokens] for place in order[:KEPT]],
            "score": right[order[0]],
            "chance": None if right[0] is None else float(np.mean(right)),
        }


def common_choices(name: str, choices: str, data: EvalData) -> list[str]:
    """Returns the choices of all records; [] if each has its own.

    Args:
      name: of the evaluation.
      choices: `evals.NAME.choices`: texts with | between them, "answers" for all answers of the split, or "" for the
        choices of each record.

    Raises:
      UserError (status 2): a record has fewer than two choices, or all records have.
    """
    if not choices:
        bare = next((info.id for info in data.infos() if len(info.extras.choices) < 2), None)
        if bare is not None:
            raise UserError(
                f"evals.{name}: the record {bare!r} has fewer than two choices; name those of all records with the key "
                f"choices, such as yes{SEPARATOR}no, or {ANSWERS} for all answers of the split",
                2,
            )
        return []
    texts = [text.strip() for text in choices.split(SEPARATOR)]
    if choices == ANSWERS:
        texts = [answer for info in data.infos() for answer in info.references]
    texts = [text for text in dict.fromkeys(texts) if text]
    if len(texts) < 2:
        raise UserError(f"evals.{name}.choices is {choices!r}, which are {len(texts)} choices; two are needed", 2)
    return texts


def score(found: Found, written: Written, shown: dict[int, dict], seed: int) -> Result:
    """Scores the choices. A record without an answer is kept and not scored.

    Args:
      found: what `Choices` made of the batches.
      written: the same examples.
      shown: record -> what the report shows of it.
      seed: of the interval.
    """
    examples = [example for example in found.examples if example["score"] is not None]
    if not examples:
        return written.unscored("choices", shown)
    right = {example["id"]: example["score"] for example in examples}
    others = [value for batch in found.batches for value in batch["shuffled"]]
    scores = means(examples)
    shuffled = float(np.mean(others)) if others else 0.0

    def details() -> dict:
        return {
            "type": "choices",
            "headline": "accuracy",
            "scores": scores,
            "shuffled": {"accuracy": shuffled},
            "interval": interval(list(right.values()), seed),
            **by_group(examples, means),
            **written.details(right, shown),
        }

    return Result(scores["accuracy"], {**written.numbers(), **scores, "accuracy_shuffled": shuffled}, details)


def means(examples: list[dict]) -> dict[str, float]:
    """The accuracy of what was chosen, and that of a random choice."""
    names = {"accuracy": "score", "chance": "chance"}
    return {name: float(np.mean([example[key] for example in examples])) for name, key in names.items()}
