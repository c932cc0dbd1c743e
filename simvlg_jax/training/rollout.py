"""What the task scst does between a batch and its step: the model writes captions of the pictures, and they are scored.

The devices write the captions of one micro-batch after the other, and the host scores those of one while the devices
write the next. So the memory of decoding is that of a micro-batch, and with `train.accumulate` above 1 the devices wait
for the scores of the last one alone.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simvlg_jax.data import transforms
from simvlg_jax.data.batching import pad
from simvlg_jax.data.mixture import parts_of
from simvlg_jax.data.sources import Source
from simvlg_jax.data.text import IGNORE, TextEncoder
from simvlg_jax.decoding.settings import Decoding, decoding_of
from simvlg_jax.evaluation.captioner import Captioner
from simvlg_jax.evaluation.scores.cider import Cider, Ngrams, ngrams_of
from simvlg_jax.evaluation.scores.ptb_tokenizer import tokenize
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.tasks.task import Task
from simvlg_jax.utils.errors import UserError


class Rollout:
    """Writes and scores the captions of training batches.

    Args:
      tasks: `Plan.tasks`, of which each step takes one.
      source: the training data. Its references are the corpus of the document frequencies.

    Raises:
      UserError: the longest caption that may be written is longer than `llm.max_text_tokens` (status 2), or the data
        have questions, prompts or fewer than two pictures.
    """

    def __init__(self, tasks: Sequence[Task], config: ConfigDict, mesh: Mesh, source: Source):
        spec = tasks[-1].batch
        self._name, self._text = spec.main_text, spec.texts[spec.main_text]
        decoding = decoding_of_beams(config)
        check_length(decoding, self._text.encoder)
        self._captioners = [Captioner(task.model, self._text.encoder, decoding) for task in tasks]
        self._mesh, self._parts, self._multiple = mesh, config.train.accumulate, config.data.pad_multiple
        self._select = jax.jit(
            lambda x, part: x.reshape(-1, self._parts, *x.shape[1:])[:, part],  # as the step splits a batch
            out_shardings=meshes.batch_sharding(mesh),
        )
        self._replicate = jax.jit(lambda x: x, out_shardings=meshes.replicated(mesh))
        self._cider = Cider(corpus(config, source))
        if self._cider.pictures < 2:
            raise UserError("the task scst needs at least two training pictures: CIDEr of a single one is always 0")

    def __call__(
        self, number: int, params: dict, batch: dict[str, jax.Array], references: Sequence[Sequence[str]]
    ) -> dict[str, jax.Array]:
        """Returns a batch with the model's captions and their rewards; `data.batch` describes both layouts.

        Args:
          number: of the task that the step takes.
          params: all parameters.
          references: of each of this process's rows; none of a blank one, whose captions get the reward 0.
        """
        captioner, parts = self._captioners[number], self._parts
        written = [self._replicate(captioner(params, self._select(batch["image"], part)).ids) for part in range(parts)]
        size = len(batch["image"])
        rows = np.array(meshes.local_rows(self._mesh, size))
        ids = np.empty((size, *written[0].shape[1:]), np.int32)
        rewards = np.zeros((len(rows), ids.shape[1]), np.float32)
        for part, some in enumerate(written):
            ids[part::parts] = np.asarray(some)
            mine = np.flatnonzero(rows % parts == part)
            for place, texts in zip(mine, captioner.decode(ids[rows[mine]]), strict=True):
                rewards[place] = [reward(self._cider, text, references[place]) for text in texts]
        made = self._arrays(ids, rows) | {"reward": rewards}
        return batch | meshes.put_batch(made, self._mesh)

    def _arrays(self, ids: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        """What the step takes of captions.

        Args:
          ids: (B, K, T) int32, of the global batch, so that every process pads to the same length.
          rows: (b,), those of this process.
        """
        encoder, limit = self._text.encoder, self._text.max_tokens
        ends = ids == encoder.end
        lengths = np.where(ends.any(-1), ends.argmax(-1) + 1, ids.shape[-1])  # with the end token, if there is one
        longest = len(encoder.prefix) + int(lengths.max())
        length = min(limit, -(-longest // self._multiple) * self._multiple) if self._multiple else limit
        own = zip(ids[rows].reshape(-1, ids.shape[-1]).tolist(), lengths[rows].ravel().tolist(), strict=True)
        texts = [tokens[:written] for tokens, written in own]
        before = list(encoder.prefix)
        shape = (len(rows), ids.shape[1], length)
        arrays = {
            "ids": pad([before + text for text in texts], length, encoder.pad_id),
            "mask": pad([[1] * (len(before) + len(text)) for text in texts], length, 0),
            "targets": pad([[IGNORE] * len(before) + text for text in texts], length, IGNORE),
        }
        return {f"{self._name}_{name}": array.reshape(shape) for name, array in arrays.items()}


def decoding_of_beams(config: ConfigDict) -> Decoding:
    """Returns the settings of `config.evaluate` with `train.beams` beams, of which all are given."""
    return decoding_of(config, dict(num_beams=config.train.beams, num_captions=config.train.beams, do_sample=False))


def check_length(decoding: Decoding, encoder: TextEncoder) -> None:
    needed = len(encoder.prefix) + decoding.max_tokens
    if needed > encoder.max_tokens:
        raise UserError(
            f"the captions that scst writes have up to {needed} tokens (evaluate.max_new_tokens, the start and "
            f"llm.prompt), and llm.max_text_tokens is {encoder.max_tokens}: set llm.max_text_tokens={needed}",
            2,
        )


def reward(cider: Cider, caption: str, references: Sequence[str]) -> float:
    """Returns CIDEr-D, in 0..10; 0 without references. No other text of the batch matters: each is tokenised alone."""
    return cider(count(caption), list(map(count, references))) if references else 0.0


@functools.lru_cache(maxsize=2**14)
def count(text: str) -> Ngrams:
    """Counts the n-grams of a caption's tokens."""
    return ngrams_of(*tokenize([text]))


def corpus(config: ConfigDict, source: Source) -> Iterator[list[Ngrams]]:
    """Yields the n-grams of the references of each readable training picture, once.

    Raises:
      UserError: a record has a question or a prompt.
    """
    for part in parts_of(config.data, source):
        seen = set()
        for index in range(len(part.source)):
            try:
                info = part.source.info(index)
            except transforms.UNREADABLE:
                continue
            if info.question is not None or info.prompt:
                raise UserError(f"the task scst learns captions, and {info.id!r} has a question or a prompt", 2)
            if info.id not in seen and info.references:
                seen.add(info.id)
                yield list(map(count, info.references))
