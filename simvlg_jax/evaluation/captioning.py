"""Evaluates the captions of a split: BLEU, ROUGE-L, CIDEr, the loss, and a control with shuffled references."""

import base64
import functools
import io

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from simvlg_jax.data import transforms
from simvlg_jax.data.sources import check_unique_ids
from simvlg_jax.decoding.generate import decoding_options
from simvlg_jax.evaluation import metrics
from simvlg_jax.evaluation.captioner import Captioner
from simvlg_jax.evaluation.evaluator import EvalData, Result, unreadable_metric
from simvlg_jax.parallel.collectives import gather
from simvlg_jax.tasks.task import Task
from simvlg_jax.utils.errors import UserError
from simvlg_jax.utils.progress import SILENT, Announcer

GALLERY = 24  # examples whose picture and merge map the report shows


captioner_of = functools.lru_cache(maxsize=4)(Captioner)  # evaluations share one, which is compiled once


class Captioning:
    """Scores greedy captions; the score is CIDEr."""

    def __init__(self, name: str, entry: ConfigDict, task: Task, config: ConfigDict, mesh: Mesh):
        if not task.captions:
            raise UserError(f"evals.{name}: a model of this task writes no captions; set another type", 2)
        self.name, self.every = name, entry.every
        self.data = EvalData(entry, task, config, mesh)
        self._side, self._seed = task.batch.pictures.side, config.seed
        self._captioner = captioner_of(task.model, task.batch.texts["caption"].encoder, **decoding_options(config))
        self._losses = task.evaluation_losses

    def __call__(self, params: dict, announce: Announcer = SILENT) -> Result:
        loss, examples, unreadable = self.caption(params, announce)
        check_unique_ids([example["id"] for example in examples])
        references = {example["id"]: example["references"] for example in examples}
        captions = {example["id"]: example["caption"] for example in examples}
        scores = metrics.score_captions(references, captions)
        shuffled = metrics.shuffled_control(references, captions, self._seed)
        exact = float(np.mean([example["caption"] in example["references"] for example in examples]))

        def details() -> dict:
            return {
                "num_examples": len(examples),
                "unreadable": unreadable,
                "loss": loss,
                "scores": scores.as_dict(),
                "shuffled": shuffled,
                "exact_match": exact,
                "examples": self._illustrated(
                    [{**example, "cider": scores.cider_per_example[example["id"]]} for example in examples]
                ),
            }

        numbers = {"loss": loss, **scores.as_dict(), "CIDEr_shuffled": shuffled["CIDEr"], "exact_match": exact}
        return Result(scores.as_dict()["CIDEr"], {**numbers, **unreadable_metric(unreadable)}, details)

    def caption(self, params: dict, announce: Announcer = SILENT) -> tuple[float, list[dict], list[str]]:
        """Computes the loss and the greedy captions of all readable records.

        Returns:
          (mean nats per target token, [{"index", "id", "references", "caption", "source_map"}] in the order of the
          source, ids of unreadable pictures), the same on every process.

        Raises:
          UserError: no picture can be read.
        """
        examples: dict[int, dict] = {}
        unreadable: dict[int, int] = {}
        total = count = 0.0
        for batch in self.data:
            with announce.first("compiling the evaluation", f"for texts of {batch['caption_ids'].shape[1]} tokens"):
                losses, targets = self._losses(params, batch)
                prompts = (batch["prompt_ids"], batch["prompt_mask"]) if "prompt_ids" in batch else None
                output = self._captioner(params, batch["image"], prompts)
                jax.block_until_ready((losses, output))
            total, count = total + float(losses["caption"].sum()), count + float(targets["caption"].sum())
            captions = self._captioner.decode(gather(output.ids))
            indices, skipped = gather(batch["index"]), gather(batch["skipped"])  # (B,)
            maps = [None] * len(indices) if output.source_map is None else gather(output.source_map).tolist()
            for caption, source_map, index, code in zip(captions, maps, indices, skipped, strict=True):
                if index < 0:
                    continue
                if code:
                    unreadable[int(index)] = int(code)
                    continue
                info = self.data.source.info(int(index))
                examples[int(index)] = {
                    "index": int(index),
                    "id": info.id,
                    "references": list(info.references),
                    "caption": caption,
                    "source_map": source_map,
                }
        left_out = self.data.report_unreadable(unreadable)
        return total / max(count, 1.0), [examples[index] for index in sorted(examples)], left_out

    def _illustrated(self, examples: list[dict]) -> list[dict]:
        """Adds the picture (base64 PNG) to a seeded sample of the examples. Removes the source map of the others."""
        chosen = set(np.random.default_rng(self._seed).permutation(len(examples))[:GALLERY].tolist())
        illustrated = []
        for number, example in enumerate(examples):
            index = example.pop("index")
            if number in chosen:
                picture = transforms.decode(self.data.source[index]["image"])
                buffer = io.BytesIO()
                Image.fromarray(np.asarray(transforms.squash(picture, self._side))).save(buffer, "PNG")
                illustrated.append({**example, "image": base64.b64encode(buffer.getvalue()).decode()})
            else:
                illustrated.append({key: value for key, value in example.items() if key != "source_map"})
        return illustrated
