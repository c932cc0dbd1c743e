"""Lets a model write a text for every record of an evaluation: captions, or answers where records have questions."""

import functools
import time

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simvlg_jax.decoding.settings import Decoding
from simvlg_jax.evaluation.batches import described, skipped_of, through_batches
from simvlg_jax.evaluation.captioner import Captioner
from simvlg_jax.evaluation.evaluator import EvalData
from simvlg_jax.evaluation.partial import Partial
from simvlg_jax.evaluation.written import Written
from simvlg_jax.parallel.collectives import gather
from simvlg_jax.tasks.task import Task
from simvlg_jax.utils.errors import UserError
from simvlg_jax.utils.progress import Announcer

captioner_of = functools.lru_cache(maxsize=4)(Captioner)  # evaluations share one, which is compiled once


class Writer:
    """Writes the texts of one entry of `config.evals`.

    Raises:
      UserError: the task writes no texts, or the data cannot be read.
    """

    def __init__(self, name: str, entry: ConfigDict, task: Task, config: ConfigDict, mesh: Mesh, decoding: Decoding):
        if not task.captions:
            raise UserError(f"evals.{name}: a model of this task writes no captions; set another type", 2)
        self.name, self.data, self._seed = name, EvalData(entry, task, config, mesh), config.seed
        self._captioner = captioner_of(task.model, task.batch.texts["caption"].encoder, decoding)
        self._losses = task.evaluation_losses
        self._compiled: set[int] = set()  # lengths of the prompts that the captioner has had

    def __call__(self, params: dict, announce: Announcer, partial: Partial | None = None) -> Written:
        """Computes the losses and the texts of all readable records; arguments and errors as `through_batches`."""

        def make(arrays: dict[str, jax.Array], number: int) -> dict:
            return self._batch(params, arrays, self._seed + number)

        found = through_batches(self.name, self.data, announce, partial, make)
        targets = sum(batch["targets"] for batch in found.batches)
        loss = sum(batch["loss"] for batch in found.batches) / targets if targets else None
        return Written(loss, found.examples, found.unreadable)

    def _batch(self, params: dict, arrays: dict[str, jax.Array], seed: int) -> dict:
        """JSON of a batch, as `through_batches` takes it, with the summed loss and the number of targets."""
        losses, targets = self._losses(params, arrays)
        prompts = (arrays["prompt_ids"], arrays["prompt_mask"]) if "prompt_ids" in arrays else None
        losses, targets = gather(losses["caption"]), gather(targets["caption"])  # (B,)
        start = time.perf_counter()
        ids = gather(self._captioner(params, arrays["image"], prompts, seed).ids)
        seconds = (time.perf_counter() - start) / len(ids)
        length = prompts[0].shape[1] if prompts else 0
        compiled = length in self._compiled
        self._compiled.add(length)
        indices, skipped = gather(arrays["index"]).tolist(), gather(arrays["skipped"]).tolist()
        examples = []
        for row, texts in enumerate(self._captioner.decode(ids)):
            if indices[row] < 0 or skipped[row]:
                continue
            info = self.data.source.info(indices[row])
            example = {**described(indices[row], info), "caption": texts[0]}
            if len(texts) > 1:
                example["captions"] = texts
            example["loss"] = float(losses[row] / targets[row]) if targets[row] else None
            examples.append(example)
        return {
            "examples": examples,
            "skipped": skipped_of(indices, skipped),
            "loss": float(losses.sum()),
            "targets": float(targets.sum()),
            "seconds": seconds if compiled else None,
        }
