"""Evaluates whether a model sees the order of frames: it is shown clips and their reverses, which have other captions.

A reverse is made after the frames were sampled: the same frames in the other order. For each clip and each reverse the
model chooses between two captions, that of the clip and that of its reverse, by their likelihood. A model that regards
the frames as a set has the same margin (the difference of the two log-likelihoods) for both, so that it is right once
and wrong once: its accuracy is exactly one half.

Rounding could spoil this, since a sum over frames in another order differs in its last bits. So margins of a clip and
its reverse that differ by less than NOISE count as equal, which makes the pair one right and one wrong choice. Both
passes run the same programs on batches of the same layout, so equal soft prompts give margins of equal bits. Products
of float32 are computed in full precision, also where an accelerator would round them by default.

We measured NOISE on a CPU with the trained example as a model without order (random temporal weights, 64 clips): the
margins differed by 0.00009 nats at most in float32, and in bfloat16 by 0.58, although most did not differ at all. A
typical margin there was 3 nats. So a margin that changes by less than NOISE tells nothing of the order.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simvlg_jax.config.check import lookup
from simvlg_jax.data.captions import CLEANERS
from simvlg_jax.data.sources import RecordInfo
from simvlg_jax.evaluation.batches import Found, described, skipped_of, through_batches
from simvlg_jax.evaluation.evaluator import EvalData, Result
from simvlg_jax.evaluation.gallery import Gallery
from simvlg_jax.evaluation.groups import by_group
from simvlg_jax.evaluation.likelihood import Query, likelihood_of
from simvlg_jax.evaluation.partial import Partial
from simvlg_jax.evaluation.scores.bootstrap import interval
from simvlg_jax.evaluation.written import Written
from simvlg_jax.parallel.collectives import gather
from simvlg_jax.tasks.task import Task
from simvlg_jax.utils.errors import UserError
from simvlg_jax.utils.progress import SILENT, Announcer

# Nats by which margins may differ that are equal but for rounding: in float32, and in bfloat16 or int8.
NOISE, COARSE_NOISE = 1e-3, 1.0


class Order:
    """Scores the choice between the caption of a clip and that of its reverse; the score is the share of right ones.

    A tie counts one half. The control chooses for the clip of another record. Records without the caption of their
    reverse are kept and not scored.
    """

    def __init__(self, name: str, entry: ConfigDict, task: Task, config: ConfigDict, mesh: Mesh):
        if not task.captions or not task.batch.pictures.frames:
            raise UserError(
                f"evals.{name}: the type order is for models that write captions of clips (data.frames above 0); set "
                "another type",
                2,
            )
        self.name, self.every, self._seed = name, entry.every, config.seed
        self.data = EvalData(entry, task, config, mesh)
        if not any(map(has_reverse, self.data.infos())):
            raise UserError(
                f"evals.{name}: no record of this split has a caption of the reversed clip (reverse_caption)", 2
            )
        clean = lookup(CLEANERS, "data.clean", entry.data.get("clean", config.data.clean))
        coarse = config.dtype != "float32" or config.frozen_compute
        self._clean, self._noise = clean.caption, COARSE_NOISE if coarse else NOISE
        encoder = task.batch.texts["caption"].encoder
        self._likelihood = likelihood_of(task.model, encoder, self.data.batch_size, mesh=mesh)
        self._reverse = jax.jit(lambda images: images[:, ::-1])  # (B, F, S, S, 3)
        self._gallery = Gallery(self.data, task, config.seed)

    def __call__(self, params: dict, announce: Announcer = SILENT, partial: Partial | None = None) -> Result:
        found = through_batches(
            self.name, self.data, announce, partial, lambda arrays, number: self._batch(params, arrays)
        )
        shown = self._gallery(params, [example["index"] for example in found.examples]) if partial else {}
        return score(found, shown, self._seed)

    def _batch(self, params: dict, arrays: dict[str, jax.Array]) -> dict:
        """JSON of a batch, as `through_batches` takes it, and the scores of the choices for other clips."""
        indices, skipped = gather(arrays["index"]).tolist(), gather(arrays["skipped"]).tolist()
        rows = [row for row, index in enumerate(indices) if index >= 0 and not skipped[row]]
        infos = {row: self.data.source.info(indices[row]) for row in rows}
        pairs = [row for row in rows if has_reverse(infos[row])]
        texts = {row: [infos[row].references[0], infos[row].extras.reverse_caption] for row in pairs}
        asked = [(row, row) for row in pairs]  # clip, and whose captions
        asked += zip([*pairs[1:], *pairs[:1]], pairs, strict=True) if len(pairs) > 1 else []
        queries = [Query(clip, infos[row].prompt, self._clean(text)) for clip, row in asked for text in texts[row]]

        def margins(images: jax.Array) -> list[float]:
            """Nats by which each clip favours the first of its two captions."""
            likely = self._likelihood(params, self._likelihood.encode(params, images), queries)
            return [own.nats - other.nats for own, other in zip(likely[::2], likely[1::2], strict=True)]

        both: list[tuple[float, float]] = []
        if pairs:
            with jax.default_matmul_precision("highest"):
                forth, back = (margins(images) for images in (arrays["image"], self._reverse(arrays["image"])))
            both = list(zip(forth, back, strict=True))
        own = dict(zip(pairs, both[: len(pairs)], strict=True))
        examples = [
            {**described(indices[row], infos[row]), **self._example(texts.get(row), own.get(row))} for row in rows
        ]
        others = [share_right(*each, self._noise) for each in both[len(pairs) :]]
        return {"examples": examples, "skipped": skipped_of(indices, skipped), "shuffled": others}

    def _example(self, texts: Sequence[str] | None, margins: tuple[float, float] | None) -> dict:
        """The part of an example that depends on the choices."""
        if texts is None:
            return {"references": [], "caption": "", "loss": None, "margins": None, "score": None}
        return {
            "references": texts[:1],
            "reverse_caption": texts[1],
            "caption": texts[0] if margins[0] > 0 else texts[1],
            "loss": None,
            "margins": margins,
            "score": share_right(*margins, self._noise),
        }


def has_reverse(info: RecordInfo) -> bool:
    """Whether captions of the clip and of its reverse are known, and differ."""
    return bool(info.references) and info.extras.reverse_caption not in (None, info.references[0])


def share_right(forth: float, back: float, noise: float) -> float:
    """The share of right choices for a clip and its reverse: 0, 1/4, 1/2, 3/4 or 1.

    Args:
      forth, back: log-likelihood of the clip's caption less that of the reverse's, in nats: for the clip, and for its
        reverse. The choice for the clip is right if it is above 0, for the reverse if it is below.
      noise: margins that differ by less are taken for equal.
    """
    if abs(forth - back) < noise:
        return 0.5
    return ((forth > 0) + (forth == 0) / 2 + (back < 0) + (back == 0) / 2) / 2


def score(found: Found, shown: dict[int, dict], seed: int) -> Result:
    """Scores the choices.

    Args:
      found: what `Order` made of the batches.
      shown: record -> what the report shows of it.
      seed: of the interval.
    """
    written = Written(None, found.examples, found.unreadable)
    examples = written.labelled()
    if not examples:
        return written.unscored("order", shown)
    right = {example["id"]: example["score"] for example in examples}
    others = [value for batch in found.batches for value in batch["shuffled"]]
    scores, groups = mean(examples), by_group(examples, mean)
    shuffled = float(np.mean(others)) if others else 0.5

    def details() -> dict:
        return {
            "type": "order",
            "headline": "accuracy",
            "scores": scores,
            "shuffled": {"accuracy": shuffled},
            "interval": interval(list(right.values()), seed),
            **groups,
            **written.details(right, shown),
        }

    each = {f"accuracy_{name}": own["accuracy"] for name, own in groups.get("groups", {}).items()}
    return Result(scores["accuracy"], {**written.numbers(), **scores, "accuracy_shuffled": shuffled, **each}, details)


def mean(examples: list[dict]) -> dict[str, float]:
    return {"accuracy": float(np.mean([example["score"] for example in examples]))}
