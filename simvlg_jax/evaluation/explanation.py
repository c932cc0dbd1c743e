"""What a model makes of one picture: which visual tokens merge, layer by layer, and the loss of each token."""

from typing import NamedTuple

import numpy as np

from simvlg_jax.data.batching import collate
from simvlg_jax.data.examples import Example
from simvlg_jax.evaluation.gallery import by_token, explainer
from simvlg_jax.tasks.caption import PICTURE_AND_CAPTION
from simvlg_jax.tasks.task import Task


class Explanation(NamedTuple):
    """Attributes:
    caption: the text that is explained.
    layers: for each layer of the connector the source map after it, (N,) int32: which token each of the N visual tokens
      is part of. A class token is the first of them, and of a clip the patches of all frames follow. Empty for a
      connector that merges nothing.
    tokens: [text, nats] of each token of the caption, its end included. The nats are low for tokens that the model
      expects.
    attention: of a ViT with temporal merging the share of its attention that each frame draws, (F,); else None.
    """

    caption: str
    layers: list[np.ndarray]
    tokens: list[list[str | float]]
    attention: np.ndarray | None = None


def explain(task: Task, params: dict, image: np.ndarray, caption: str, prompt: str = "") -> Explanation:
    """Returns the explanation of one picture, in one forward pass.

    Args:
      params: all parameters.
      image: (S, S, 3) uint8, or a clip (F, S, S, 3).
      prompt: what the caption continues.
    """
    spec, encoder = task.batch, task.batch.texts["caption"].encoder
    batch = collate([Example(image, spec.encode(caption, prompt))], spec=spec, multiple=0)
    maps, losses, drawn = explainer(task.model)(params, *(batch[name] for name in PICTURE_AND_CAPTION))
    tokens = by_token(encoder, batch["caption_targets"][0], np.asarray(losses)[0])
    attention = None if drawn is None else np.asarray(drawn)[0]
    return Explanation(caption, [np.asarray(layer)[0] for layer in maps], tokens, attention)
