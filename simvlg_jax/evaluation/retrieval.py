"""Evaluates retrieval: how often the nearest sentence of a picture is its own, and the contrastive loss."""

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simvlg_jax.evaluation.evaluator import EvalData, Result, unreadable_metric
from simvlg_jax.evaluation.partial import Partial
from simvlg_jax.parallel.collectives import gather
from simvlg_jax.tasks.task import Task
from simvlg_jax.utils.errors import UserError
from simvlg_jax.utils.progress import SILENT, Announcer


class Retrieval:
    """Ranks all sentences for each picture; the score is R@1."""

    def __init__(self, name: str, entry: ConfigDict, task: Task, config: ConfigDict, mesh: Mesh):
        ranking = task.ranking or task.contrast
        if ranking is None:
            raise UserError(f"evals.{name}: this task has no contrastive loss; set another type", 2)
        self.name, self.every = name, entry.every
        self.data = EvalData(entry, task, config, mesh)
        self._batch_size = config.evaluate.batch_size
        if not all(info.references for info in self.data.infos()):
            raise UserError(f"evals.{name}: a record of this split has no caption, and retrieval needs one of each", 2)
        self._embed = jax.jit(lambda params, batch: ranking.embed(params, batch, None))
        self._losses = jax.jit(ranking.losses)

    def __call__(self, params: dict, announce: Announcer = SILENT, partial: Partial | None = None) -> Result:
        """Scores a split. The loss is computed in groups of evaluate.batch_size, in the order of the source.

        Nothing is kept in `partial`: embedding is quick.
        """
        del partial
        pictures, sentences = [], []
        unreadable: dict[int, int] = {}
        for batch in self.data:
            with announce.first("compiling the evaluation", f"for texts of {batch['sentence_ids'].shape[1]} tokens"):
                picture, sentence = map(gather, self._embed(params, batch))
            index, real, skipped = (gather(batch[name]) for name in ("index", "weight", "skipped"))
            real = real > 0
            pictures.append(picture[real])
            sentences.append(sentence[real])
            unreadable |= dict(zip(index[skipped > 0].tolist(), skipped[skipped > 0].tolist(), strict=True))
        left_out = self.data.report_unreadable(unreadable)
        picture, sentence = np.concatenate(pictures), np.concatenate(sentences)  # (N, [Q,] S), (N, S)
        groups = [slice(start, start + self._batch_size) for start in range(0, len(picture), self._batch_size)]
        weight = np.ones(len(picture), np.float32)
        losses = [self._losses(params, picture[rows], sentence[rows], weight[rows]).sum() for rows in groups]
        loss = float(sum(losses)) / len(picture)
        numbers = {"loss": loss, **recall(similarities(picture, sentence), (1, 5))}
        details = {
            "type": "retrieval",
            "headline": "R@1",
            "scores": numbers,
            **numbers,
            "num_examples": len(picture),
            "unreadable": left_out,
        }
        return Result(numbers["R@1"], {**numbers, **unreadable_metric(left_out)}, lambda: details)


def similarities(picture: np.ndarray, sentence: np.ndarray) -> np.ndarray:
    """Returns (N, N) of pictures (N, S) and sentences (N, S). Of pictures (N, Q, S) the nearest embedding counts."""
    several = picture.reshape(len(picture), -1, picture.shape[-1])
    return np.stack([(own @ sentence.T).max(0) for own in several])


def recall(similarity: np.ndarray, ranks: tuple[int, ...]) -> dict[str, float]:
    """Returns R@k: the share of rows of (N, N) whose diagonal element is among the k greatest, or ties with them."""
    greater = (similarity > np.diagonal(similarity)[:, None]).sum(1)  # (N,)
    return {f"R@{k}": float((greater < k).mean()) for k in ranks}
