"""The pictures that a report shows of an evaluation: what became of their patches, and the loss of each token."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from simvlg_jax.data.text import IGNORE, TextEncoder
from simvlg_jax.data.views import view_of
from simvlg_jax.evaluation.evaluator import EvalData
from simvlg_jax.evaluation.report.pictures import picture_text, sheet_text, video_url
from simvlg_jax.parallel.collectives import gather
from simvlg_jax.tasks.caption import PICTURE_AND_CAPTION
from simvlg_jax.tasks.task import Task

SIZE = 24


class Gallery:
    """Adds pictures, merge maps and the loss by token to a seeded sample of the examples of an evaluation.

    Args:
      data: of the evaluation.
      task: the model.
      seed: of the sample.
    """

    def __init__(self, data: EvalData, task: Task, seed: int):
        self._data, self._seed, self._view = data, seed, view_of(task.batch.pictures)
        self._encoder = task.batch.texts["caption"].encoder
        self._explain = explainer(task.model)

    def __call__(self, params: dict, indices: Sequence[int]) -> dict[int, dict]:
        """Chooses among the records `indices`; all processes call it.

        Returns:
          index -> "image" (`picture_text`), "source_map" and "layers" (see `VisualOutput`; None and [] for
          a connector without), and "tokens", [text, nats] of each target of the first reference. Of a clip "image" is a
          sheet of its "frames" (their number), source maps go through all of them, "video" is a URL or None, and
          "attention" the share that each frame draws in a temporal ViT, or None.
        """
        chosen = np.random.default_rng(self._seed).permutation(len(indices))[:SIZE]
        chosen = sorted(indices[place] for place in chosen)
        shown: dict[int, dict] = {}
        for arrays in self._data.only(chosen):
            maps, losses, drawn = self._explain(params, *(arrays[name] for name in PICTURE_AND_CAPTION))
            layers = [gather(layer).tolist() for layer in maps]  # L lists of (B, N)
            attention = None if drawn is None else gather(drawn).round(4).tolist()  # (B, F)
            losses, targets = gather(losses), gather(arrays["caption_targets"])  # (B, L)
            for row, place in enumerate(gather(arrays["index"]).tolist()):
                if place >= 0:
                    index = chosen[place]
                    own = [layer[row] for layer in layers]
                    shown[index] = {
                        **self._picture(index),
                        "source_map": own[-1] if own else None,
                        "layers": own,
                        "attention": attention and attention[row],
                        "tokens": by_token(self._encoder, targets[row], losses[row]),
                    }
        return shown

    def _picture(self, index: int) -> dict:
        record = self._data.source[index]
        pixels = self._view.evaluate(record)
        if pixels.ndim == 3:
            return {"image": picture_text(pixels)}
        return {"image": sheet_text(pixels), "frames": len(pixels), "video": video_url(record["image"])}


def by_token(encoder: TextEncoder, targets: np.ndarray, losses: np.ndarray) -> list[list[str | float]]:
    """The text and the nats of each target of a caption; `targets` and `losses` are (L,)."""
    pairs = zip(targets, losses, strict=True)
    return [[encoder.token_text(int(target)), round(float(loss), 4)] for target, loss in pairs if target != IGNORE]


@functools.lru_cache(maxsize=64)
def explainer(model):
    """A jitted `SimVLG.explain` of parameters and its arguments, shared by all that ask for the same model.

    It returns the layers of the merge map alone, and not the features of the picture. Those of a clip go through all
    frames. Then the nats of the targets, and of a temporal ViT the share of attention that each frame draws, (B, F),
    the mean over blocks; else None.
    """

    def explain(params, *arguments):
        out, inner = model.apply({"params": params}, *arguments, method="explain", mutable="intermediates")
        visual, losses = out
        layers = [model.frames.through(layer, model.vit.class_token) for layer in visual.layers]
        flat = traverse_util.flatten_dict(inner.get("intermediates", {}))
        drawn = [x[0].reshape(-1, *x[0].shape[-2:]) for path, x in flat.items() if path[-1] == "drawn"]
        return layers, losses, jnp.concatenate(drawn).mean(0) if drawn else None

    return jax.jit(explain)
