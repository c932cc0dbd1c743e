"""Evaluates the captions of a split: BLEU, ROUGE-L, CIDEr, the loss, and a control with shuffled references."""

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simvlg_jax.decoding.settings import decoding_of
from simvlg_jax.evaluation.evaluator import Result
from simvlg_jax.evaluation.gallery import Gallery
from simvlg_jax.evaluation.partial import Partial
from simvlg_jax.evaluation.scores import captions as scoring
from simvlg_jax.evaluation.scores.bootstrap import interval
from simvlg_jax.evaluation.submissions import coco
from simvlg_jax.evaluation.writer import Writer
from simvlg_jax.evaluation.written import Written
from simvlg_jax.tasks.task import Task
from simvlg_jax.utils.progress import SILENT, Announcer


class Captioning:
    """Scores captions; the score is CIDEr. Of several captions of a picture the first one counts."""

    def __init__(self, name: str, entry: ConfigDict, task: Task, config: ConfigDict, mesh: Mesh):
        self.name, self.every, self._seed = name, entry.every, config.seed
        self._write = Writer(name, entry, task, config, mesh, decoding_of(config))
        self.data = self._write.data
        self._gallery = Gallery(self.data, task, config.seed)

    def __call__(self, params: dict, announce: Announcer = SILENT, partial: Partial | None = None) -> Result:
        written = self._write(params, announce, partial)
        shown = self._gallery(params, [example["index"] for example in written.examples]) if partial else {}
        return score(written, shown, self._seed)._replace(files=coco(written.texts()))


def score(written: Written, shown: dict[int, dict], seed: int) -> Result:
    """Scores what the model wrote. A record without captions is kept and not scored, as in NoCaps' test split.

    Args:
      shown: record -> what the report shows of it.
      seed: of the shuffled control and the interval.
    """
    examples = written.labelled()
    if not examples:
        return written.unscored("captioning", shown)
    references = {example["id"]: example["references"] for example in examples}
    captions = {example["id"]: example["caption"] for example in examples}
    scores = scoring.score_captions(references, captions)
    shuffled = scoring.shuffled_control(references, captions, seed)
    exact = float(np.mean([example["caption"] in example["references"] for example in examples]))

    def details() -> dict:
        ciders = scores.cider_per_example
        return {
            "type": "captioning",
            "headline": "CIDEr",
            "scores": scores.as_dict(),
            "shuffled": shuffled,
            "interval": interval(list(ciders.values()), seed),
            "exact_match": exact,
            **written.details(ciders, shown),
        }

    numbers = {**scores.as_dict(), "CIDEr_shuffled": shuffled["CIDEr"], "exact_match": exact}
    return Result(scores.as_dict()["CIDEr"], {**written.numbers(), **numbers}, details)
