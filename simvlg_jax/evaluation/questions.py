"""Evaluates the answers to the questions of a split: their accuracy, the loss, and a control with shuffled answers."""

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simvlg_jax.config.check import lookup
from simvlg_jax.decoding.settings import decoding_of
from simvlg_jax.evaluation.evaluator import Result
from simvlg_jax.evaluation.gallery import Gallery
from simvlg_jax.evaluation.groups import by_group
from simvlg_jax.evaluation.partial import Partial
from simvlg_jax.evaluation.scores.answers import ACCURACIES, Accuracy
from simvlg_jax.evaluation.scores.bootstrap import interval
from simvlg_jax.evaluation.scores.control import derangement
from simvlg_jax.evaluation.scores.lemmas import Nlp, lemmatise, load_nlp
from simvlg_jax.evaluation.submissions import OF_METRIC
from simvlg_jax.evaluation.writer import Writer
from simvlg_jax.evaluation.written import Written
from simvlg_jax.tasks.task import Task
from simvlg_jax.utils.errors import UserError
from simvlg_jax.utils.progress import SILENT, Announcer

PUBLISHED = dict(num_beams=5, max_new_tokens=10, min_new_tokens=1, length_penalty=0.0)  # decoding of answers


class Questions:
    """Scores answers; the score is the mean of the accuracy that `evals.NAME.metric` names.

    Answers are decoded as published, but for the keys of `evals.NAME.decoding`. All other settings are those of
    `config.evaluate`.
    """

    def __init__(self, name: str, entry: ConfigDict, task: Task, config: ConfigDict, mesh: Mesh):
        self.name, self.every, self._seed = name, entry.every, config.seed
        metric = entry.metric or "vqa"
        self._accuracy = lookup(ACCURACIES, f"evals.{name}.metric", metric)
        self._files = OF_METRIC[metric]
        self._nlp = load_nlp(f"evals.{name}.lemmatise") if entry.lemmatise else None
        self._write = Writer(name, entry, task, config, mesh, decoding_of(config, PUBLISHED | dict(entry.decoding)))
        self.data = self._write.data
        if self.data.source.info(0).question is None:
            raise UserError(f"evals.{name}: these records have no questions; set the type to captioning", 2)
        self._gallery = Gallery(self.data, task, config.seed)

    def __call__(self, params: dict, announce: Announcer = SILENT, partial: Partial | None = None) -> Result:
        written = self._write(params, announce, partial)
        if self._nlp is not None:
            written = lemmatised(written, self._nlp)
        shown = self._gallery(params, [example["index"] for example in written.examples]) if partial else {}
        return score(written, shown, self._accuracy, self._seed)._replace(files=self._files(written.texts()))


def lemmatised(written: Written, nlp: Nlp) -> Written:
    """Replaces the answers by their base forms; "written" of an example is what the model wrote."""
    changed = ({"caption": lemmatise(one["caption"], nlp), "written": one["caption"]} for one in written.examples)
    return written._replace(examples=[one | new for one, new in zip(written.examples, changed, strict=True)])


def score(written: Written, shown: dict[int, dict], accuracy: Accuracy, seed: int) -> Result:
    """Scores what the model answered. A record without answers is kept and not scored, as in VQAv2's test split.

    Args:
      shown: record -> what the report shows of it.
      accuracy: (answer, people's answers) -> 0..1.
      seed: of the shuffled control and the interval.
    """
    examples = written.labelled()
    if not examples:
        return written.unscored("questions", shown)
    right = {one["id"]: accuracy(one["caption"], one["references"]) for one in examples}
    mean, shuffled = float(np.mean(list(right.values()))), 0.0
    if len(examples) > 1:
        others = derangement(len(examples), seed)
        pairs = zip(examples, others, strict=True)
        shuffled = float(np.mean([accuracy(one["caption"], examples[other]["references"]) for one, other in pairs]))

    def details() -> dict:
        return {
            "type": "questions",
            "headline": "accuracy",
            "scores": {"accuracy": mean},
            "shuffled": {"accuracy": shuffled},
            "interval": interval(list(right.values()), seed),
            **by_group(examples, lambda some: {"accuracy": float(np.mean([right[one["id"]] for one in some]))}),
            **written.details(right, shown),
        }

    return Result(mean, {**written.numbers(), "accuracy": mean, "accuracy_shuffled": shuffled}, details)
