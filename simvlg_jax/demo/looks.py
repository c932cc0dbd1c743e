"""What the page shows of a picture or clip: a model with any number of visual tokens, its texts, merge map and time."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from simvlg_jax.evaluation.caption_model import CaptionModel
from simvlg_jax.evaluation.cost import visual_tokens
from simvlg_jax.models.token_merging import token_counts

REPEATS = 3  # the time is the median of so many runs
LONG_SECONDS = 2.0  # of all of them together; then fewer have to do

Say = Callable[[float, str], None]  # shows which share of the work is done, and what is being done


class Written(NamedTuple):
    """Attributes:
    tokens: number of visual tokens that the language model read.
    text: a caption or an answer.
    seconds: from the picture to the text, without compiling.
    """

    tokens: int
    text: str
    seconds: float


class Looks:
    """A model with every number of visual tokens. Each number is compiled at its first use and kept.

    Attributes:
      merges: whether its connector merges. Another has its own number of tokens alone.
      own: number of visual tokens by the schedule of the model.
      least, most: the numbers that its connector can merge down to.
      patches: number of patches of a picture, or of a clip.
      class_token: whether there is one more token, of no patch.
      shape: of the pictures or clips that it sees.
    """

    def __init__(self, model: CaptionModel):
        connector, vit = model.task.model.connector, model.task.model.vit
        seen = model.task.model.frames.seen(vit)
        self.merges, self.class_token = bool(connector.merges), connector.class_token
        self.own = self.least = self.most = visual_tokens(model.task, model.params)
        if self.merges:
            self.most = seen.num_output_tokens
            halving = [seen.num_tokens] * connector.depth  # each layer merges as many as it can
            self.least = min(self.most, token_counts(seen.num_tokens, halving, connector.class_token)[-1])
        self.shape = model.task.batch.pictures
        self.patches = (vit.num_tokens - vit.class_token) * max(self.shape.frames, 1)
        self._models = {self.own: model}
        self._compiled: set[tuple] = set()

    @property
    def kind(self) -> str:
        """What it sees, in a word."""
        return "clip" if self.shape.frames else "picture"

    def caption(self, image: np.ndarray, tokens: int, say: Say) -> Written:
        """Returns the caption of a picture (S, S, 3) or clip (F, S, S, 3) uint8 from so many visual tokens."""
        model = self._model(tokens)
        return self._timed(("caption", tokens), tokens, lambda: model.caption(image), say)

    def answer(self, image: np.ndarray, question: str, tokens: int, say: Say) -> Written:
        """Returns the answer to a question about a picture or clip, as in `caption`."""
        model = self._model(tokens)
        return self._timed(("answer", tokens, question), tokens, lambda: model.answer(image, question), say)

    def layers(self, image: np.ndarray, caption: str, tokens: int, say: Say) -> Sequence[np.ndarray]:
        """Returns the source map after each layer, see `Explanation`; none of a connector that mixes the patches."""
        program = ("layers", tokens)
        say(0.6, "drawing the merge map" if program in self._compiled else "compiling the merge map (once)")
        layers = self._model(tokens).explain(image, caption).layers
        self._compiled.add(program)
        return layers

    def _model(self, tokens: int) -> CaptionModel:
        if tokens not in self._models:
            self._models[tokens] = self._models[self.own].with_merging(tokens=tokens)
        return self._models[tokens]

    def _timed(self, program: tuple, tokens: int, write: Callable[[], str], say: Say) -> Written:
        """Runs `write` and times it. The first run of a program compiles it and does not count."""
        if program not in self._compiled:
            say(0.1, f"compiling for {tokens} visual tokens (once)")
            write()
            self._compiled.add(program)
        say(0.5, f"writing from {tokens} visual tokens")
        text, seconds = "", []
        while len(seconds) < REPEATS and sum(seconds) < LONG_SECONDS:
            start = time.perf_counter()
            text = write()
            seconds.append(time.perf_counter() - start)
        return Written(tokens, text, statistics.median(seconds))
