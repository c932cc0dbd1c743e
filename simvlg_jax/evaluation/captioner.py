"""Captions pictures with the model, its tokenizer and jitted greedy decoding."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from simvlg_jax.data.text import TextEncoder
from simvlg_jax.decoding.generate import greedy_decode
from simvlg_jax.models.simvlg import SimVLG


@struct.dataclass
class CaptionOutput:
    """ids (B, T) int32, padded after the end token; source_map (B, N) int32 or None, see `VisualOutput`."""

    ids: jax.Array
    source_map: jax.Array | None


class Captioner:
    """Captions batches of one picture size.

    Args:
      model: the SimVLG module.
      text: provides the start, prompt, end and pad ids.
      max_new_tokens, min_new_tokens: lengths without start token and prompt.
      repetition_penalty: see `greedy_decode`.
    """

    def __init__(
        self,
        model: SimVLG,
        text: TextEncoder,
        max_new_tokens: int,
        min_new_tokens: int = 0,
        repetition_penalty: float = 1.0,
    ):
        self._text = text
        options = dict(
            max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens, repetition_penalty=repetition_penalty
        )
        self._jitted = jax.jit(
            lambda params, images, ids, mask: _caption(model, params, images, ids, mask, text, **options)
        )

    def __call__(
        self, params: dict, images: jax.Array, prompt: str | tuple[jax.Array, jax.Array] | None = None
    ) -> CaptionOutput:
        """Captions a batch.

        Args:
          params: all parameters of the model.
          images: (B, S, S, 3) uint8.
          prompt: words that the captions continue, or the ids and the mask of a prompt for each picture, (B, Q) int32,
            padded on the left, without the start token; default: the prompt of the config.
        """
        if isinstance(prompt, tuple):
            return self._jitted(params, images, *prompt)
        ids = self._text.prefix[1:]
        if prompt is not None:
            ids = self._text.tokenizer.encode(prompt, add_special_tokens=False).ids
        ids = np.broadcast_to(np.asarray(ids, np.int32), (len(images), len(ids)))
        return self._jitted(params, images, ids, np.ones_like(ids))

    def decode(self, ids: np.ndarray) -> list[str]:
        """Decodes (B, T) ids to stripped texts without special tokens."""
        ends = (self._text.end, self._text.pad_id)
        rows: Sequence[list[int]] = [[int(i) for i in row if i not in ends] for row in ids]
        return [caption.strip() for caption in self._text.tokenizer.decode_batch(rows)]


def _caption(
    model: SimVLG,
    params: dict,
    images: jax.Array,
    ids: jax.Array,  # (B, Q)
    mask: jax.Array,  # (B, Q)
    text: TextEncoder,
    **options: float,
) -> CaptionOutput:
    visual = model.apply({"params": params}, images, method="encode_image")
    start = jnp.full((images.shape[0], 1), text.prefix[0], jnp.int32)
    prefix = model.prompted(visual.prefix, model.apply({"params": params}, start, method="embed_text"))
    written = greedy_decode(
        model.llm,
        params["llm"],
        prefix,
        ids,
        mask,
        eos_id=text.end,
        pad_id=text.pad_id,
        **options,
    )
    return CaptionOutput(written, visual.source_map)
