"""Lets a model write a text for every record of an evaluation: captions, or answers where records have questions."""

import functools
import time
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simvlg_jax.data.sources import check_unique_ids
from simvlg_jax.decoding.settings import Decoding
from simvlg_jax.evaluation.captioner import Captioner
from simvlg_jax.evaluation.evaluator import EvalData, unreadable_metric
from simvlg_jax.evaluation.partial import Partial
from simvlg_jax.parallel.collectives import gather
from simvlg_jax.tasks.task import Task
from simvlg_jax.utils.bar import Progress
from simvlg_jax.utils.errors import UserError
from simvlg_jax.utils.progress import Announcer

captioner_of = functools.lru_cache(maxsize=4)(Captioner)  # evaluations share one, which is compiled once


class Written(NamedTuple):
    """What a model wrote for the readable records, the same on every process.

    Attributes:
      loss: mean nats per target token, over all records.
      examples: of each record, in the order of the source: index, id, question (if it has one), references, caption
        (what it wrote first), captions (all, if several) and loss (mean nats per target token, None without targets).
      unreadable: ids of the other records.
    """

    loss: float
    examples: list[dict]
    unreadable: list[str]

    def numbers(self) -> dict[str, float]:
        """Loss and the number of unreadable records, if any, for the log."""
        return {"loss": self.loss, **unreadable_metric(self.unreadable)}


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
        """Computes the losses and the texts of all readable records.

        Args:
          partial: keeps finished batches, and holds those of an interrupted evaluation. With it a bar is shown.

        Raises:
          UserError: no record can be read, or two have one id.
        """
        batches = list(partial.batches) if partial else []
        shown = partial is not None and jax.process_index() == 0
        before = sum(len(batch["examples"]) + len(batch["skipped"]) for batch in batches)
        progress = Progress(f"scoring {self.name}", len(self.data), before, "pictures", "pictures", shown)
        try:
            count = 0
            for number, arrays in self.data.batches(start=len(batches)):
                length = arrays["caption_ids"].shape[1]
                with announce.first("compiling the evaluation", f"for texts of {length} tokens"):
                    batch = self._batch(params, arrays, self._seed + number)
                batches.append(batch)
                if partial:
                    partial.add(batch)
                count += len(batch["examples"]) + len(batch["skipped"])
                progress.update(count, count)
        finally:
            progress.close()
        skipped = {index: code for batch in batches for index, code in batch["skipped"]}
        examples = [example for batch in batches for example in batch["examples"]]
        unreadable = self.data.report_unreadable(skipped)
        check_unique_ids([example["id"] for example in examples])
        targets = sum(batch["targets"] for batch in batches)
        loss = sum(batch["loss"] for batch in batches) / max(targets, 1.0)
        return Written(loss, sorted(examples, key=lambda example: example["index"]), unreadable)

    def _batch(self, params: dict, arrays: dict[str, jax.Array], seed: int) -> dict:
        """JSON of a batch: its examples, [index, code] of the skipped records, summed loss and number of targets."""
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
            example = {"index": indices[row], "id": info.id, "references": list(info.references), "caption": texts[0]}
            if info.question is not None:
                example["question"] = info.question
            if len(texts) > 1:
                example["captions"] = texts
            example["loss"] = float(losses[row] / targets[row]) if targets[row] else None
            examples.append(example)
        return {
            "examples": examples,
            "skipped": [[index, code] for index, code in zip(indices, skipped, strict=True) if index >= 0 and code],
            "loss": float(losses.sum()),
            "targets": float(targets.sum()),
            "seconds": seconds if compiled else None,
        }
