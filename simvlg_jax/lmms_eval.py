"""A model for the harness lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval) and its tasks of one picture.

    pip install . -r requirements-lmms.txt
    python -m lmms_eval --model simvlg_jax --model_args pretrained=runs/vqa --tasks vqav2_val --batch_size 16

The harness finds the model by the entry point of the installed package. --model_args has the arguments of `SimVLG` and
keys of the config, such as evaluate.num_beams=1, with commas between them. Most tasks put an instruction on the line
below the question, such as "Answer the question using a single word or phrase."; context=first_line leaves it out.
"""

from collections.abc import Sequence

from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from simvlg_jax.api import load
from simvlg_jax.config.check import lookup
from simvlg_jax.utils.bar import Progress
from simvlg_jax.utils.errors import UserError, warn

MANIFEST = ModelManifest("simvlg_jax", simple_class_path="simvlg_jax.lmms_eval.SimVLG")
# The question in the text of a request; None: there is none, and the model writes captions.
CONTEXTS = {
    "question": lambda text: text,
    "first_line": lambda text: text.partition("\n")[0],
    "ignore": lambda text: None,
}


class SimVLG(lmms):
    """Answers the requests of tasks. Decoding is that of the model's config, not of the task; only "until" is applied.

    Args:
      pretrained: a run's folder, an exported model or "example".
      checkpoint: see `api.load`.
      context: "question": the text of a request is a question; "first_line": its first line is; "ignore": the model
        captions the picture.
      batch_size: pictures per batch.
      config: keys of the config and their values.

    Raises:
      UserError: the model cannot be loaded, or an argument is wrong.
    """

    def __init__(
        self,
        pretrained: str = "example",
        checkpoint: str = "best",
        context: str = "question",
        batch_size: int | str = 16,
        **config: object,
    ):
        super().__init__()
        self._question, self._size = lookup(CONTEXTS, "context", context), int(batch_size)
        overrides = [f"--config.{key}={value}" for key, value in config.items()]
        self._model = load(pretrained, checkpoint=str(checkpoint), overrides=overrides)

    def generate_until(self, requests: Sequence) -> list[str]:
        """Returns a text for each request."""
        texts: list[str] = []
        progress = Progress("writing", len(requests), 0, "pictures", "pictures")
        self._say_what_is_not_used(requests)
        try:
            for start in range(0, len(requests), self._size):
                group = [request.args for request in requests[start : start + self._size]]
                pictures, questions = self._inputs(group)
                if questions is None:
                    written = self._model.captions(pictures, batch_size=self._size)
                else:
                    written = self._model.answers(pictures, questions, self._size)
                for arguments, text in zip(group, written, strict=True):
                    texts.append(cut(text, arguments[1].get("until", ())))
                    self.cache_hook.add_partial("generate_until", arguments[:2], texts[-1])
                progress.update(len(texts), len(texts))
        finally:
            progress.close()
        return texts

    def loglikelihood(self, requests: Sequence) -> list[GenerationResult]:
        """Returns (nats of loss, whether greedy decoding would write it) for the text of each request.

        The harness chooses the text of the lowest number. It would turn a bare pair into a string (version 0.7.3).
        """
        group = [request.args for request in requests]
        pictures, questions = self._inputs(group)
        texts = [text(self._document(*place)) if callable(text) else text for _, text, _, *place in group]
        likely = self._model.loglikelihoods(pictures, questions, texts, self._size)
        return [GenerationResult((-nats, greedy)) for nats, greedy in likely]

    def _document(self, number: int, task: str, split: str) -> dict:
        return self.task_dict[task][split][number]

    def _inputs(self, group: Sequence[tuple]) -> tuple[list[Image.Image], list[str] | None]:
        """Returns the pictures of requests, and their questions, if they are asked."""
        if any(len(arguments) != 6 for arguments in group):
            raise UserError("this task has requests without a picture")
        pictures = [self._picture(visuals, *place) for _, _, visuals, *place in group]
        questions = [self._question(arguments[0].replace("<image>", "").strip()) for arguments in group]
        return pictures, None if None in questions else questions

    def _picture(self, visuals, number: int, task: str, split: str) -> Image.Image:
        found = visuals(self._document(number, task, split))
        if len(found) != 1 or not isinstance(found[0], Image.Image):
            kinds = ", ".join(type(each).__name__ for each in found) or "nothing"
            raise UserError(f"example {number} of {task} has {kinds}; this model takes one picture")
        return found[0]

    def _say_what_is_not_used(self, requests: Sequence) -> None:
        asked = {name: value for request in requests[:1] for name, value in request.args[1].items() if name != "until"}
        if asked:
            warn(f"the task asks for {asked}; the model decodes by its own config (--model_args evaluate.KEY=VALUE)")

    def generate_until_multi_round(self, requests: Sequence) -> list:
        raise UserError("simvlg_jax takes tasks of one question, and this one has several rounds")


def cut(text: str, until: str | Sequence[str]) -> str:
    """Returns the text before the first of the strings at which it ends."""
    for end in [until] if isinstance(until, str) else until:
        text = text.partition(end)[0] if end else text
    return text.strip()
