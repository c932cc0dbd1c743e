"""What a text costs: visual tokens that the language model gets, and seconds."""

import statistics

import jax
import numpy as np

from simvlg_jax.tasks.task import Task


def cost(task: Task, params: dict, batches: list[dict]) -> dict:
    """Returns what eval/NAME.json says about the cost of an evaluation.

    Args:
      task: the model.
      params: its parameters.
      batches: the finished ones of a `Partial`, with "seconds" per picture, None in one that compiled.

    Returns:
      "visual_tokens": of each picture or clip, None for a task that writes no texts; and "seconds_per_picture": from
      pixels to the ids of the text, the median over the batches that compiled nothing, None if there is none.
    """
    seconds = [batch["seconds"] for batch in batches if batch.get("seconds") is not None]
    return {
        "visual_tokens": visual_tokens(task, params) if task.captions else None,
        "seconds_per_picture": statistics.median(seconds) if seconds else None,
    }


def visual_tokens(task: Task, params: dict) -> int:
    images = jax.ShapeDtypeStruct(task.batch.pictures.shape(1), np.uint8)
    visual = jax.eval_shape(
        lambda params, images: task.model.apply({"params": params}, images, method="encode_image"), params, images
    )
    return visual.prefix.shape[1]
