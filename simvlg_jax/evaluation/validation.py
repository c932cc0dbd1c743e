"""Scores of a split: captions against references for SimVLG, retrieval for the contrastive task."""

import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simvlg_jax.data import pipeline, transforms
from simvlg_jax.data.sources import Source, check_unique_ids, load_source
from simvlg_jax.decoding.generate import decoding_options
from simvlg_jax.evaluation import metrics
from simvlg_jax.evaluation.captioner import Captioner
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.parallel.processes import gather
from simvlg_jax.tasks.task import Task
from simvlg_jax.utils.errors import UserError, warn
from simvlg_jax.utils.progress import SILENT, Announcer


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
    """(params, batch) -> the losses and counts of `Task.losses` in evaluation."""
    return jax.jit(lambda params, batch: losses(params, batch, None)[:2])


captioner_of = functools.lru_cache(maxsize=4)(Captioner)  # one, so compiled once, for all validations of a run


class Validation:
    """The scores of "val" while training.

    The data are opened, and one batch is read, when it is made: what is wrong with them shows before the first step.

    Raises:
      UserError: there is no such split, or it cannot be read.
    """

    def __init__(self, task: Task, config: ConfigDict, mesh: Mesh):
        self._task, self._config, self._mesh = task, config, mesh
        try:
            source = load_source(config.data, "val")
        except UserError as error:
            message = f"{error}\nor train without validation: --config.train.eval_every=0"
            raise UserError(message, error.status) from error
        count = config.evaluate.max_examples
        self._source = FirstOf(source, count) if count else source
        next(iter(eval_batches(task, config, self._source, mesh)))

    def __call__(self, params: dict, announce: Announcer = SILENT) -> dict[str, float | str]:
        """Scores the parameters. "score" is what the best checkpoint is chosen by: CIDEr, or R@1."""
        arguments = (self._task, self._config, params, self._mesh, self._source, announce)
        if self._config.task == "contrastive":
            results = retrieval(*arguments)
            scores = {name: results[name] for name in ("score", "loss", "R@1", "R@5")}
        else:
            results = caption_split(*arguments)
            scores = self._caption_scores(results)
        unreadable = {"unreadable": float(len(results["unreadable"]))} if results["unreadable"] else {}
        return {"split": "val", **scores, **unreadable}

    def _caption_scores(self, results: dict) -> dict[str, float]:
        references, hypotheses = by_id(results["examples"])
        shuffled = metrics.shuffled_control(references, hypotheses, self._config.seed)
        scores = metrics.score_captions(references, hypotheses).as_dict()
        return {
            "score": scores["CIDEr"],
            "loss": results["loss"],
            **scores,
            "CIDEr_shuffled": shuffled["CIDEr"],
        }


def by_id(examples: list[dict]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """(references, captions) of `caption_split`'s examples by their ids, as the metrics take them.

    Raises:
      UserError: two pictures share an id, so one would hide the other.
    """
    check_unique_ids([example["id"] for example in examples])
    return {e["id"]: e["references"] for e in examples}, {e["id"]: e["caption"] for e in examples}


def caption_split(
    task: Task, config: ConfigDict, params: dict, mesh: Mesh, source: Source, announce: Announcer = SILENT
) -> dict:
    """Loss and greedy captions of every record that can be read.

    Returns:
      {"loss": mean nats per target token, "examples": [{"index", "id", "references", "caption", "source_map"}],
      "unreadable": names of the pictures that cannot be read and are left out}, all in the source's order, the same on
      every process.

    Raises:
      UserError: no picture can be read.
    """
    captioner = captioner_of(task.model, task.text_encoder, **decoding_options(config))
    examples: dict[int, dict] = {}
    unreadable: list[int] = []
    total = weight = 0.0
    for _, batch in eval_batches(task, config, source, mesh):
        with announce.first("compiling the evaluation", f"for texts of {batch['ids'].shape[1]} tokens"):
            losses, weights, *_ = jitted_losses(task.losses)(params, batch)
            output = captioner(params, batch["image"])
            jax.block_until_ready((losses, output))
        total, weight = total + float(losses.sum()), weight + float(weights.sum())
        captions = captioner.decode(gather(output.ids))
        rows = (captions, gather(output.source_map), gather(batch["index"]), gather(batch["weight"]))
        for caption, source_map, index, counts in zip(*rows, strict=True):
            if index < 0:
                continue
            if not counts:
                unreadable.append(int(index))
                continue
            record = source[int(index)]
            examples[int(index)] = {
                "index": int(index),
                "id": record["id"],
                "references": list(record["references"]),
                "caption": caption,
                "source_map": source_map.tolist(),
            }
    return {
        "loss": total / max(weight, 1.0),
        "examples": [examples[index] for index in sorted(examples)],
        "unreadable": report_unreadable(sorted(unreadable), source),
    }


def report_unreadable(indices: list[int], source: Source) -> list[str]:
    """Warns of pictures that are left out of a score, and returns their names.

    Raises:
      UserError: all are.
    """
    names = [name_of(source, index) for index in indices]
    first = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    if len(names) == len(source):
        raise UserError(f"none of the {len(source)} pictures can be read, so there is nothing to score: {first}")
    if names and jax.process_index() == 0:
        warn(f"{len(names)} of {len(source)} pictures cannot be read and are left out of the score: {first}")
    return names


def name_of(source: Source, index: int) -> str:
    """A record's id, or its number if it cannot be read at all."""
    try:
        return source[index]["id"]
    except transforms.UNREADABLE:
        return f"record {index}"


def retrieval(
    task: Task, config: ConfigDict, params: dict, mesh: Mesh, source: Source, announce: Announcer = SILENT
) -> dict:
    """How often a picture's own sentence is its nearest (R@1) or among five (R@5), and the contrastive loss.

    Returns:
      {"score": R@1, "loss": in groups of evaluate.batch_size in the source's order, "R@1", "R@5", "num_examples",
      "unreadable": names of the pictures that cannot be read and are left out}.
    """
    embed = jitted_embed(task.model)
    pictures, sentences = [], []
    unreadable: list[int] = []
    for _, batch in eval_batches(task, config, source, mesh):
        with announce.first("compiling the evaluation", f"for texts of {batch['ids'].shape[1]} tokens"):
            picture, sentence = map(gather, embed(params, batch["image"], batch["ids"], batch["mask"]))
        index, real = gather(batch["index"]), gather(batch["weight"]) > 0
        pictures.append(picture[real])
        sentences.append(sentence[real])
        unreadable += index[(index >= 0) & ~real].tolist()
    left_out = report_unreadable(unreadable, source)
    picture, sentence = np.concatenate(pictures), np.concatenate(sentences)  # (N, S)
    size = config.evaluate.batch_size
    groups = [slice(start, start + size) for start in range(0, len(picture), size)]
    losses = [jax.jit(task.contrast.losses)(params, picture[rows], sentence[rows]).sum() for rows in groups]
    similarity = picture @ sentence.T  # (N, N)
    own = np.diagonal(similarity)[:, None]
    rank = (similarity > own).sum(1)  # 0: nearest
    recall = {f"R@{k}": float((rank < k).mean()) for k in (1, 5)}
    loss = float(sum(losses)) / len(picture)
    return {"score": recall["R@1"], "loss": loss, **recall, "num_examples": len(picture), "unreadable": left_out}


@functools.lru_cache(maxsize=4)
def jitted_embed(model) -> Callable:
    return jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))
