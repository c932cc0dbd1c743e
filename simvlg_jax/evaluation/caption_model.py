"""A model that captions pictures and answers questions about them, with everything it takes to do so."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict

from simvlg_jax.config.load import override
from simvlg_jax.data.captions import CLEANERS
from simvlg_jax.data.pictures import Picture, read_picture
from simvlg_jax.data.sources import prompt_of
from simvlg_jax.decoding.settings import decoding_of
from simvlg_jax.evaluation.captioner import Captioner
from simvlg_jax.tasks import build_task
from simvlg_jax.tasks.task import Task
from simvlg_jax.utils.errors import UserError

if TYPE_CHECKING:
    from simvlg_jax.evaluation.explanation import Explanation

PROMPT_MULTIPLE = 16  # questions are padded to a multiple of it, so that few lengths are compiled
PLACE = "{}"  # of the question in `data.prompt`


class CaptionModel:
    """A model that captions pictures and answers questions about them.

    Attributes:
      config: the config of the model.
      task: the model and its text encoder.
      params: all parameters, on the devices.
    """

    def __init__(self, config: ConfigDict, task: Task, params: dict, chosen: Collection[str] = ()):
        """Args:
        chosen: keys of `config.evaluate` that also hold for answers, instead of the published decoding.
        """
        self.config, self.task, self.params, self._chosen = config, task, params, chosen
        self._encoder = task.batch.texts["caption"].encoder
        self._prompt = config.data.prompt if PLACE not in config.data.prompt else ""  # of captions
        self._captioner = Captioner(task.model, self._encoder, decoding_of(config))

    @cached_property
    def _answerer(self) -> Captioner:
        from simvlg_jax.evaluation.questions import PUBLISHED

        published = {name: value for name, value in PUBLISHED.items() if name not in self._chosen}
        return Captioner(self.task.model, self._encoder, decoding_of(self.config, published))

    def caption(self, picture: Picture, prompt: str | None = None) -> str:
        """Returns the caption of one picture. See `captions`."""
        return self.captions([picture], prompt, 1)[0]

    def captions(self, pictures: Sequence[Picture], prompt: str | None = None, batch_size: int = 16) -> list[str]:
        """Returns the caption of each picture, the first one of `several`."""
        return [captions[0] for captions in self.several(pictures, prompt, batch_size)]

    def several(
        self, pictures: Sequence[Picture], prompt: str | None = None, batch_size: int = 16, seed: int = 0
    ) -> list[list[str]]:
        """Returns `evaluate.num_captions` captions of each picture, decoded by the settings of `config.evaluate`.

        Args:
          pictures: file names, PIL images or uint8 arrays (H, W, 3) of any size, squashed to the model's square. A
            model of clips also takes videos and arrays (T, H, W, 3), see `pictures.read_visual`.
          prompt: words that the captions continue.
          batch_size: pictures per batch. The last batch is padded, so that the model compiles once.
          seed: of the draws, with `evaluate.do_sample`.

        Raises:
          UserError: a picture cannot be read. The message names it.
        """
        prompts = self._caption_prompts(prompt, len(pictures))
        return self._write(self._captioner, pictures, prompts, batch_size, seed)

    def answer(self, picture: Picture, question: str) -> str:
        """Returns the answer to a question about one picture. See `answers`."""
        return self.answers([picture], [question], 1)[0]

    def answers(self, pictures: Sequence[Picture], questions: str | Sequence[str], batch_size: int = 16) -> list[str]:
        """Returns the answer to a question about each picture, the first one of `several_answers`."""
        return [answers[0] for answers in self.several_answers(pictures, questions, batch_size)]

    def several_answers(
        self, pictures: Sequence[Picture], questions: str | Sequence[str], batch_size: int = 16, seed: int = 0
    ) -> list[list[str]]:
        """Returns `evaluate.num_captions` answers to a question about each picture.

        A question is cleaned and put into a prompt as in the model's training; by default "Question: {} Short answer:".
        Decoding is the published one: 5 beams, 1 to 10 tokens, length penalty 0. Keys of `config.evaluate` that were
        overridden when the model was loaded replace it.

        Args:
          pictures, batch_size, seed: as for `several`.
          questions: one for each picture, or one for all.

        Raises:
          UserError: a picture cannot be read, or there are not as many questions as pictures.
        """
        questions = [questions] * len(pictures) if isinstance(questions, str) else questions
        if len(questions) != len(pictures):
            raise UserError(f"{len(questions)} questions and {len(pictures)} pictures: give a question for each", 2)
        return self._write(self._answerer, pictures, self._answer_prompts(questions), batch_size, seed)

    def loglikelihoods(
        self, pictures: Sequence[Picture], questions: Sequence[str] | None, texts: Sequence[str], batch_size: int = 16
    ) -> list[tuple[float, bool]]:
        """Returns how likely a text is about each picture, to rank given answers; see `likelihood.loglikelihood`.

        Args:
          pictures, batch_size: as for `several`.
          questions: that the texts answer, one for each picture; None: the texts are captions.
          texts: one for each picture.

        Returns:
          For each the nats, summed over its tokens, and whether greedy decoding would write it.
        """
        from simvlg_jax.evaluation.likelihood import loglikelihood

        shape = self.task.batch.pictures
        prompts = [self._prompt] * len(texts) if questions is None else self._answer_prompts(questions)
        requests = zip((read_picture(picture, shape) for picture in pictures), prompts, texts, strict=True)
        return loglikelihood(self.task, self.params, list(requests), batch_size)

    def explain(self, picture: Picture, caption: str | None = None) -> "Explanation":
        """Returns which parts of a picture the model merged, and how likely each token of the caption is to it.

        Args:
          caption: the text to explain; default: the model's own caption.

        Raises:
          UserError: the picture cannot be read.
        """
        from simvlg_jax.evaluation.explanation import explain

        image = read_picture(picture, self.task.batch.pictures)
        caption = self.caption(image) if caption is None else caption
        return explain(self.task, self.params, image, caption, self._prompt)

    def with_merging(
        self, *, tokens: int = 0, r: int = 0, inflect: float = 0.0, merges: Sequence[int] = ()
    ) -> "CaptionModel":
        """Returns the model with another merging schedule and the same parameters, which are not read or copied again.

        Give one of tokens, r (with inflect) and merges; without any, no tokens are merged. Each schedule compiles a
        program of its own, so keep the returned model. A connector that does not merge takes those that its config has.

        Args: as the keys of `config.connector`.
          tokens: number of visual tokens that are left, from evenly spread merges.
          r: number of tokens that every layer merges away.
          inflect: with r: from -1 (all in early layers) to 1 (all in late layers).
          merges: number of tokens that each layer merges away.

        Raises:
          UserError: the schedule does not fit the model, or its connector has no such key.
        """
        if merges and not self.task.model.connector.merges:
            raise UserError(f"the connector of this model ({self.config.connector.type}) merges no tokens", 2)
        schedule = dict(tokens=tokens, r=r, inflect=float(inflect), merges=tuple(merges), budgets=())
        config = override(self.config, [f"--config.connector.{key}={value}" for key, value in schedule.items()])
        task = dataclasses.replace(build_task(config), batch=self.task.batch)  # the tokenizer is not read again
        return CaptionModel(config, task, self.params, self._chosen)

    def prepare(
        self, shapes: dict, batch_size: int, prompt: str | None = None, question: str | None = None
    ) -> Callable[[], None]:
        """Traces the program that `several` runs, or with a question `several_answers`, before the parameters are read.

        Args:
          shapes: ShapeDtypeStructs of the parameters.

        Returns:
          What compiles it, see `Captioner.prepare`.
        """
        picture = list(np.zeros(self.task.batch.pictures.shape(1), np.uint8))
        if question is None:
            return self._captioner.prepare(shapes, *self._batch(picture, self._caption_prompts(prompt, 1), batch_size))
        return self._answerer.prepare(shapes, *self._batch(picture, self._answer_prompts([question]), batch_size))

    def _caption_prompts(self, prompt: str | None, count: int) -> list[str] | str | None:
        return [self._prompt] * count if self._prompt and prompt is None else prompt

    def _answer_prompts(self, questions: Sequence[str]) -> list[str]:
        data = self.config.data
        template = data.prompt if PLACE in data.prompt else ""
        return [prompt_of(question, CLEANERS[data.clean], template) for question in questions]

    def _write(
        self,
        captioner: Captioner,
        pictures: Sequence[Picture],
        prompts: list[str] | str | None,
        batch_size: int,
        seed: int,
    ) -> list[list[str]]:
        """Returns the texts of each picture. `prompts`: one for each picture, or as the captioner takes them."""
        texts = []
        for start in range(0, len(pictures), batch_size):
            chosen = slice(start, start + batch_size)
            given = prompts[chosen] if isinstance(prompts, list) else prompts
            output = captioner(self.params, *self._batch(pictures[chosen], given, batch_size), seed + start)
            texts += captioner.decode(np.asarray(output.ids))[: len(pictures[chosen])]
        return texts

    def _batch(self, pictures: Sequence[Picture], prompts: list[str] | str | None, batch_size: int) -> tuple:
        """Returns pictures (batch_size, ...) as the model sees them, filled up with black ones, and the prompts."""
        shape, blank = self.task.batch.pictures, batch_size - len(pictures)
        images = np.stack([*(read_picture(p, shape) for p in pictures), *np.zeros(shape.shape(blank), np.uint8)])
        if isinstance(prompts, list):
            from simvlg_jax.data.batching import pad_prompts

            return images, pad_prompts(self._encoder, [*prompts, *[""] * blank], PROMPT_MULTIPLE)
        return images, prompts
