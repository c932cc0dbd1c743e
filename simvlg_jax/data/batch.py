"""The layout of a batch, defined once for the pipeline, initialisation, AOT compilation and the tests.

A batch is a dict of arrays of B examples:

    image           uint8 (B, S, S, 3), or clips (B, F, S, S, 3); not normalised
    NAME_ids        int32 (B, L), padded on the right
    NAME_mask       int32 (B, L), 1 where there is a token
    NAME_targets    int32 (B, L), -100 where there is no loss; only of texts that are predicted
    weight          float32 (B,), 1 for examples that count; 0 for blank ones: a black picture, no targets

If captions are packed (`data.pack`), each row of the main text holds b captions one after the other, with C tokens of
room:

    NAME_ids, NAME_mask, NAME_targets   int32 (B / b, C)
    NAME_lengths    int32 (B / b, b), the tokens of each caption

If the model writes the main text itself (`BatchSpec.beams`), K times for each picture, the pipeline also gives

    references      of each example all captions of its picture, a tuple of str; on the host alone

and the step takes, in place of those and of the caption (`training.rollout`),

    NAME_ids, NAME_mask, NAME_targets   int32 (B, K, L)
    reward          float32 (B, K), of each text

NAME is a text of the task: "caption", "sentence". A blank example stands in the place of a record that cannot be used.
In evaluation it also fills up the last batch. Evaluation batches also have

    index           int32 (B,), position of the example in its source; -1 for what fills up the last batch
    skipped         int32 (B,), 0, or the number in `skipped.REASONS`, from 1 on, of why the record cannot be used
    prompt_ids      int32 (B, Q), what the caption continues, without the start token; padded on the left
    prompt_mask     int32 (B, Q), 1 where there is a token

The last two only exist if the records have prompts of their own (questions, or `data.prompt`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from simvlg_jax.data.text import TextEncoder

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Pictures:
    """The visual input: pictures of `side` x `side` pixels, or clips of `frames` such pictures (0: pictures)."""

    side: int
    frames: int = 0

    def shape(self, batch_size: int) -> tuple[int, ...]:
        """(B, S, S, 3), or (B, F, S, S, 3)."""
        return (batch_size, *[self.frames] * bool(self.frames), self.side, self.side, 3)


@dataclass(frozen=True)
class TextSpec:
    """One text of each example.

    Attributes:
      max_tokens: maximum length.
      predicted: whether it has targets.
      load: reads the tokenizer. Initialisation and AOT compilation do not call it.
    """

    max_tokens: int
    predicted: bool
    load: Callable[[], TextEncoder]

    @cached_property
    def encoder(self) -> TextEncoder:
        """Text -> token ids and targets."""
        return self.load()

    def __getstate__(self) -> dict:
        """Pickles the encoder for data workers, instead of `load`, which may be a closure."""
        return self.__dict__ | {"encoder": self.encoder, "load": None}

    @property
    def arrays(self) -> tuple[str, ...]:
        return ("ids", "mask", "targets") if self.predicted else ("ids", "mask")


class Pack(NamedTuple):
    """The layout of packed captions: how many share a row, and the row's tokens."""

    examples: int
    tokens: int


@dataclass(frozen=True)
class BatchSpec:
    """The inputs of a task.

    Attributes:
      pictures: None for a task without pictures.
      texts: by name. Batches are padded to the length of the first, or packed by it.
      beams: above 0: training takes so many texts that the model itself writes for each picture.
    """

    pictures: Pictures | None
    texts: Mapping[str, TextSpec]
    beams: int = 0

    @property
    def main_text(self) -> str:
        return next(iter(self.texts))

    def encode(self, caption: str, prompt: str = "") -> dict[str, tuple[list[int], list[int]]]:
        """Name -> (ids, targets). Every text of a task is the record's caption; predicted ones follow the prompt."""
        return {name: text.encoder(caption, prompt if text.predicted else "") for name, text in self.texts.items()}

    def shapes(
        self, batch_size: int, lengths: int | None = None, pack: Pack | None = None
    ) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Name -> (shape, dtype) of each array of a training batch.

        Args:
          lengths: length of every text; default: its max_tokens.
          pack: of the main text, if it is packed.
        """
        shapes = {}
        if self.pictures:
            shapes["image"] = (self.pictures.shape(batch_size), np.dtype(np.uint8))
        for name, text in self.texts.items():
            shape = (batch_size, lengths or text.max_tokens)
            if pack and name == self.main_text:
                shape = (batch_size // pack.examples, pack.tokens)
                shapes[f"{name}_lengths"] = ((shape[0], pack.examples), np.dtype(np.int32))
            shapes |= {f"{name}_{array}": (shape, np.dtype(np.int32)) for array in text.arrays}
        return shapes | {"weight": ((batch_size,), np.dtype(np.float32))}

    def step_shapes(self, batch_size: int, pack: Pack | None = None) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """`shapes` of what a training step takes, with the longest texts: those of the model, if it writes them."""
        shapes = self.shapes(batch_size, pack=pack)
        if not self.beams:
            return shapes
        name, rows = self.main_text, (batch_size, self.beams)
        text = self.texts[name]
        written = {f"{name}_{array}": ((*rows, text.max_tokens), np.dtype(np.int32)) for array in text.arrays}
        return shapes | written | {"reward": (rows, np.dtype(np.float32))}
