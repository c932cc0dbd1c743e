"""Evaluates the captions of a split: scores, also by group, the loss, and a control with shuffled references."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simvlg_jax.decoding.settings import decoding_of
from simvlg_jax.evaluation.evaluator import Result
from simvlg_jax.evaluation.gallery import Gallery
from simvlg_jax.evaluation.groups import by_group
from simvlg_jax.evaluation.partial import Partial
from simvlg_jax.evaluation.scores import captions as scoring
from simvlg_jax.evaluation.scores import java
from simvlg_jax.evaluation.scores.bootstrap import interval
from simvlg_jax.evaluation.scores.java import JavaScore
from simvlg_jax.evaluation.submissions import coco
from simvlg_jax.evaluation.writer import Writer
from simvlg_jax.evaluation.written import Written
from simvlg_jax.parallel.collectives import wait_for_all
from simvlg_jax.tasks.task import Task
from simvlg_jax.utils.progress import SILENT, Announcer


class Captioning:
    """Scores captions; the score is CIDEr. Of several captions of a picture the first one counts."""

    def __init__(self, name: str, entry: ConfigDict, task: Task, config: ConfigDict, mesh: Mesh):
        self.name, self.every, self._seed = name, entry.every, config.seed
        # Process 0 alone writes results.
        extra = entry.extra_scores if jax.process_index() == 0 else ""
        self._extra = java.open_scores(f"evals.{name}.extra_scores", extra)
        self._slow = bool(entry.extra_scores)
        self._wait()
        self._write = Writer(name, entry, task, config, mesh, decoding_of(config))
        self.data = self._write.data
        self._gallery = Gallery(self.data, task, config.seed)

    def __call__(self, params: dict, announce: Announcer = SILENT, partial: Partial | None = None) -> Result:
        written = self._write(params, announce, partial)
        shown = self._gallery(params, [example["index"] for example in written.examples]) if partial else {}
        result = score(written, shown, self._seed, self._extra)._replace(files=coco(written.texts()))
        details = result.details() if self._slow else None
        self._wait()
        return result._replace(details=lambda: details) if self._slow else result

    def _wait(self) -> None:
        """The other processes wait for process 0, whose Java takes longer than a collective may."""
        if self._slow:
            wait_for_all("java")


def score(written: Written, shown: dict[int, dict], seed: int, extra: Sequence[JavaScore] = ()) -> Result:
    """Scores what the model wrote. A record without captions is kept and not scored, as in NoCaps' test split.

    Args:
      shown: record -> what the report shows of it.
      seed: of the shuffled control and the interval.
      extra: METEOR and SPICE. The shuffled control has none of them.
    """
    examples = written.labelled()
    if not examples:
        return written.unscored("captioning", shown)
    references, captions = _texts(examples)
    own = scoring.score_captions(references, captions)
    scores = own.as_dict() | _extra_scores(examples, extra)
    shuffled = scoring.shuffled_control(references, captions, seed)
    exact = float(np.mean([example["caption"] in example["references"] for example in examples]))

    def details() -> dict:
        ciders = own.cider_per_example
        return {
            "type": "captioning",
            "headline": "CIDEr",
            "scores": scores,
            "shuffled": shuffled,
            "interval": interval(list(ciders.values()), seed),
            "exact_match": exact,
            **by_group(
                examples, lambda some: scoring.score_captions(*_texts(some)).as_dict() | _extra_scores(some, extra)
            ),
            **written.details(ciders, shown),
        }

    numbers = {**scores, "CIDEr_shuffled": shuffled["CIDEr"], "exact_match": exact}
    return Result(scores["CIDEr"], {**written.numbers(), **numbers}, details)


def _texts(examples: list[dict]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The references and the caption of each example, by id."""
    return (
        {example["id"]: example["references"] for example in examples},
        {example["id"]: example["caption"] for example in examples},
    )


def _extra_scores(examples: list[dict], extra: Sequence[JavaScore]) -> dict[str, float]:
    if not extra:
        return {}
    tokenized = scoring.tokenized(*_texts(examples))
    return {score.name: score.compute(*tokenized) for score in extra}
