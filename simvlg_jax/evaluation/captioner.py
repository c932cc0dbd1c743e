"""Captions pictures with the model, its tokenizer and jitted decoding."""

import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from simvlg_jax.data.text import TextEncoder
from simvlg_jax.decoding.generate import generate
from simvlg_jax.decoding.settings import Decoding
from simvlg_jax.models.simvlg import SimVLG

Prompt = str | tuple[jax.Array, jax.Array] | None
LEVEL = "xla_backend_optimization_level"


@struct.dataclass
class CaptionOutput:
    """ids (B, K, T) int32, padded after the end token; source_map (B, N) int32 or None, see `VisualOutput`."""

    ids: jax.Array
    source_map: jax.Array | None


class Captioner:
    """Captions batches of one picture size.

    Args:
      model: the SimVLG module.
      text: provides the start, prompt, end and pad ids.
      settings: how captions are decoded, K of them for each picture.
    """

    def __init__(self, model: SimVLG, text: TextEncoder, settings: Decoding):
        self._text = text
        self._jitted = jax.jit(
            lambda params, images, ids, mask, key: _caption(model, params, images, ids, mask, key, text, settings),
            compiler_options=_compiler_options(),
        )
        self._compiled: dict[tuple, Callable] = {}  # by the shapes of pictures and prompts

    def __call__(self, params: dict, images: jax.Array, prompt: Prompt = None, seed: int = 0) -> CaptionOutput:
        """Captions a batch.

        Args:
          params: all parameters of the model.
          images: (B, S, S, 3) uint8, or clips (B, F, S, S, 3).
          prompt: words that the captions continue, or the ids and the mask of a prompt for each picture, (B, Q) int32,
            padded on the left, without the start token; default: the prompt of the config.
          seed: of the draws, where the settings ask for samples. Give each batch its own.
        """
        arguments = self._arguments(images, prompt, seed)
        return self._compiled.get(_shapes(arguments), self._jitted)(params, *arguments)

    def prepare(self, params: dict, images: jax.Array, prompt: Prompt = None) -> Callable[[], None]:
        """Traces the program for arguments like these, of which `params` may be ShapeDtypeStructs with shardings.

        Returns:
          What compiles it, also in another thread. Calls with the same shapes use the result.
        """
        arguments = self._arguments(images, prompt, 0)
        lowered = self._jitted.lower(params, *arguments)

        def compile_it() -> None:
            self._compiled[_shapes(arguments)] = lowered.compile()

        return compile_it

    def _arguments(self, images: jax.Array, prompt: Prompt, seed: int) -> tuple:
        key = jax.random.key(seed)
        if isinstance(prompt, tuple):
            return images, *prompt, key
        ids = self._text.prefix[1:]
        if prompt is not None:
            ids = self._text.tokenizer.encode(prompt, add_special_tokens=False).ids
        ids = np.broadcast_to(np.asarray(ids, np.int32), (len(images), len(ids)))
        return images, ids, np.ones_like(ids), key

    def decode(self, ids: np.ndarray) -> list[list[str]]:
        """Decodes (B, K, T) ids to the K stripped texts of each picture, without special tokens."""
        ends = (self._text.end, self._text.pad_id)
        rows = [[int(i) for i in row if i not in ends] for row in ids.reshape(-1, ids.shape[-1])]
        texts = [text.strip() for text in self._text.tokenizer.decode_batch(rows)]
        count = ids.shape[1]
        return [texts[start : start + count] for start in range(0, len(texts), count)]


def _compiler_options() -> dict[str, int] | None:
    """Returns a level at which XLA compiles faster for a CPU, unless the user has chosen one (`XLA_FLAGS`).

    The program is as fast, since its work is in matrix products.
    """
    chosen = LEVEL in os.environ.get("XLA_FLAGS", "")
    return {LEVEL: 2} if jax.default_backend() == "cpu" and not chosen else None


def _shapes(arguments: tuple) -> tuple:
    return arguments[0].shape, arguments[1].shape


def _caption(
    model: SimVLG,
    params: dict,
    images: jax.Array,
    ids: jax.Array,  # (B, Q)
    mask: jax.Array,  # (B, Q)
    key: jax.Array,
    text: TextEncoder,
    settings: Decoding,
) -> CaptionOutput:
    visual = model.apply({"params": params}, images, method="encode_image")
    start = jnp.full((images.shape[0], 1), text.prefix[0], jnp.int32)
    prefix = model.prompted(visual.prefix, model.apply({"params": params}, start, method="embed_text"))
    special = dict(eos_id=text.end, pad_id=text.pad_id, bos_id=text.prefix[0])
    written = generate(model.llm, params["llm"], prefix, ids, mask, settings, key=key, **special)
    return CaptionOutput(written, visual.source_map)
