"""The pictures that a report shows of an evaluation, and what became of their patches."""

import base64
import functools
import io
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image

from simvlg_jax.data.views import view_of
from simvlg_jax.evaluation.evaluator import EvalData
from simvlg_jax.parallel.collectives import gather
from simvlg_jax.tasks.task import Task

SIZE = 24


class Gallery:
    """Adds pictures and merge maps to a seeded sample of the examples of an evaluation.

    Args:
      data: of the evaluation.
      task: the model.
      seed: of the sample.
    """

    def __init__(self, data: EvalData, task: Task, seed: int):
        self._data, self._seed, self._view = data, seed, view_of(task.batch.pictures)
        self._encode = _encode_image(task.model)

    def __call__(self, params: dict, indices: Sequence[int]) -> dict[int, dict]:
        """Chooses among the records `indices`; all processes call it.

        Returns:
          index -> "image" (base64 PNG; of a clip the first frame) and "source_map" (see `VisualOutput`).
        """
        chosen = np.random.default_rng(self._seed).permutation(len(indices))[:SIZE]
        chosen = sorted(indices[place] for place in chosen)
        shown: dict[int, dict] = {}
        for arrays in self._data.only(chosen):
            maps = self._encode(params, arrays["image"])
            rows = [None] * len(arrays["image"]) if maps is None else gather(maps).tolist()
            for place, row in zip(gather(arrays["index"]).tolist(), rows, strict=True):
                if place >= 0:
                    index = chosen[place]
                    shown[index] = {"image": self._picture(index), "source_map": row}
        return shown

    def _picture(self, index: int) -> str:
        pixels = self._view.evaluate(self._data.source[index])
        buffer = io.BytesIO()
        Image.fromarray(pixels if pixels.ndim == 3 else pixels[0]).save(buffer, "PNG")
        return base64.b64encode(buffer.getvalue()).decode()


@functools.lru_cache(maxsize=4)
def _encode_image(model):
    """A jitted function of parameters and pictures that returns their source maps; evaluations share it."""
    return jax.jit(lambda params, images: model.apply({"params": params}, images, method="encode_image").source_map)
