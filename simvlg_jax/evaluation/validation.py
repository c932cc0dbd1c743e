"""Scores of a split: captions against references for SimVLG, retrieval for the contrastive task."""

import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simvlg_jax.data import pipeline
from simvlg_jax.data.sources import Source, load_source
from simvlg_jax.decoding.generate import decoding_options
from simvlg_jax.evaluation import metrics
from simvlg_jax.evaluation.captioner import Captioner
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.parallel.processes import gather
from simvlg_jax.training.tasks import Task


class FirstOf:
    """The first `count` records of a source."""

    def __init__(self, source: Source, count: int):
        self._source, self._count = source, min(count, len(source))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict:
        return self._source[index]


def eval_batches(task: Task, config: ConfigDict, source: Source, mesh: Mesh) -> Iterator[tuple[dict, dict]]:
    """(this process's numpy batch, the global batch on the devices), each example once."""
    shards = meshes.batch_shards(mesh)
    batch_size = -(-config.evaluate.batch_size // shards) * shards
    batches = pipeline.make_eval_batches(
        source,
        task.text_encoder,
        image_size=task.image_size,
        batch_size=batch_size,
        rows=meshes.local_rows(mesh, batch_size),
        pad_multiple=config.data.pad_multiple,
    )
    for batch in batches:
        yield batch, meshes.put_batch(batch, mesh)


@functools.lru_cache(maxsize=4)
def jitted_losses(losses: Callable) -> Callable:
    return jax.jit(lambda params, batch: losses(params, batch, None))


captioner_of = functools.lru_cache(maxsize=4)(Captioner)  # one, so compiled once, for all validations of a run


def validate(task: Task, config: ConfigDict, params: dict, mesh: Mesh) -> dict[str, float | str]:
    """Scores "val" while training. "score" is what the best checkpoint is chosen by: CIDEr, or R@1."""
    source = load_source(config.data, "val")
    if config.evaluate.max_examples:
        source = FirstOf(source, config.evaluate.max_examples)
    if config.task == "contrastive":
        return {"split": "val", **retrieval(task, config, params, mesh, source)}
    results = caption_split(task, config, params, mesh, source)
    references = {e["id"]: e["references"] for e in results["examples"]}
    hypotheses = {e["id"]: e["caption"] for e in results["examples"]}
    shuffled = metrics.shuffled_control(references, hypotheses, config.seed)
    scores = metrics.score_captions(references, hypotheses).as_dict()
    return {
        "split": "val",
        "score": scores["CIDEr"],
        "loss": results["loss"],
        **scores,
        "CIDEr_shuffled": shuffled["CIDEr"],
    }


def caption_split(task: Task, config: ConfigDict, params: dict, mesh: Mesh, source: Source) -> dict:
    """Loss and greedy captions of every record.

    Returns:
      {"loss": mean nats per target token, "examples": [{"id", "references", "caption", "source_map"}]} in the
      source's order, the same on every process.
    """
    captioner = captioner_of(task.model, task.text_encoder, **decoding_options(config))
    examples: list[dict | None] = [None] * len(source)
    total = weight = 0.0
    for _, batch in eval_batches(task, config, source, mesh):
        losses, weights = jitted_losses(task.losses)(params, batch)
        total, weight = total + float(losses.sum()), weight + float(weights.sum())
        output = captioner(params, batch["image"])
        captions = captioner.decode(gather(output.ids))
        source_maps, indices = gather(output.source_map), gather(batch["index"])
        for index, caption, source_map in zip(indices, captions, source_maps, strict=True):
            if index >= 0:
                record = source[int(index)]
                examples[index] = {
                    "id": record["id"],
                    "references": list(record["references"]),
                    "caption": caption,
                    "source_map": source_map.tolist(),
                }
    return {"loss": total / max(weight, 1.0), "examples": examples}


def retrieval(task: Task, config: ConfigDict, params: dict, mesh: Mesh, source: Source) -> dict[str, float]:
    """Contrastive loss, and how often a picture's own sentence is its nearest (R@1) or among five (R@5)."""
    embed = jitted_embed(task.model)
    pictures, sentences, losses = [], [], []
    for _, batch in eval_batches(task, config, source, mesh):
        losses.append(float(jitted_losses(task.losses)(params, batch)[0].mean()))
        picture, sentence = map(gather, embed(params, batch["image"], batch["ids"], batch["mask"]))
        real = gather(batch["index"]) >= 0
        pictures.append(picture[real])
        sentences.append(sentence[real])
    similarity = np.concatenate(pictures) @ np.concatenate(sentences).T  # (N, N)
    own = np.diagonal(similarity)[:, None]
    rank = (similarity > own).sum(1)  # 0: nearest
    recall = {f"R@{k}": float((rank < k).mean()) for k in (1, 5)}
    return {"score": recall["R@1"], "loss": float(np.mean(losses)), **recall}


@functools.lru_cache(maxsize=4)
def jitted_embed(model) -> Callable:
    return jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))
