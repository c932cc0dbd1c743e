"""How likely the language model finds texts about pictures: what choosing among given answers is based on."""

import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from simvlg_jax.data.batching import pad
from simvlg_jax.data.text import IGNORE, TextEncoder
from simvlg_jax.models.simvlg import SimVLG
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.parallel.collectives import gather
from simvlg_jax.tasks.task import Task
from simvlg_jax.utils.errors import UserError

MULTIPLE = 8  # texts are padded to a multiple of so many tokens, so that few lengths are compiled


class Query(NamedTuple):
    """A text about a picture.

    Attributes:
      picture: its number in the batch of pictures.
      prompt: what the text continues; "" for the prompt of the config alone.
      text: whose likelihood is asked for.
    """

    picture: int
    prompt: str
    text: str


class Likely(NamedTuple):
    """How likely a text is.

    Attributes:
      nats: log-likelihood, summed over its tokens.
      tokens: their number.
      greedy: whether each of them is the likeliest one.
    """

    nats: float
    tokens: int
    greedy: bool


class Likelihood:
    """Log-likelihoods of texts about pictures. A picture is encoded once, whatever the number of texts about it.

    Prompt and text are tokenised and cut as in training (`TextEncoder`). The prompt is never counted.

    Args:
      model: the SimVLG module.
      text: of the model.
      batch_size: texts that go through the language model at once.
      end: whether the end token counts as a token of the text, as in the loss.
      mesh: whose devices share a batch; None for the default device.
    """

    def __init__(self, model: SimVLG, text: TextEncoder, batch_size: int, end: bool = True, mesh: Mesh | None = None):
        self._text, self._batch_size, self._end, self._mesh = text, batch_size, end, mesh

        def encode(params: dict, images: jax.Array) -> jax.Array:
            return model.apply({"params": params}, images, method="encode_image").prefix

        def score(params: dict, prefixes: jax.Array, rows: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            texts = (rows["ids"], rows["mask"], rows["targets"])
            prefix = jnp.take(prefixes, rows["picture"], axis=0)
            return model.apply({"params": params}, prefix, *texts, method="likelihoods")

        self.encode = jax.jit(encode)  # (parameters, images (B, S, S, 3) uint8) -> soft prompts (B, P, E)
        self._score = jax.jit(score)

    def __call__(self, params: dict, prefixes: jax.Array, queries: Sequence[Query]) -> list[Likely]:
        """Returns how likely each text is. All processes call it with the same queries.

        Args:
          prefixes: what `encode` gave for the pictures of the queries.
        """
        encoded = [self._encode(query) for query in queries]
        order = sorted(range(len(queries)), key=lambda place: len(encoded[place][0]))  # texts of one length together
        found: dict[int, Likely] = {}
        for start in range(0, len(order), self._batch_size):
            places = order[start : start + self._batch_size]
            rows = self._rows([queries[place].picture for place in places], [encoded[place] for place in places])
            nats, greedy = map(gather, self._score(params, prefixes, rows))
            for place, *likely in zip(places, nats.tolist(), greedy.tolist(), strict=False):
                tokens = sum(target != IGNORE for target in encoded[place][1])
                found[place] = Likely(likely[0], tokens, likely[1])
        return [found[place] for place in range(len(queries))]

    def _encode(self, query: Query) -> tuple[list[int], list[int]]:
        """Ids and targets, as in training; the targets are those of the text. Raises UserError if the text is cut."""
        ids, targets = self._text(query.text, query.prompt)
        if ids[-1] != self._text.end:  # without its last tokens a text would be likelier
            raise UserError(
                f"the text {query.text[:60]!r} has more tokens than llm.max_text_tokens={self._text.max_tokens} leaves "
                "for it: raise it",
                2,
            )
        targets = [IGNORE] * len(self._text.prefix) + targets[len(self._text.prefix) :]
        if not self._end and ids[-1] == self._text.end:
            targets[-1] = IGNORE
        return ids, targets

    def _rows(self, pictures: list[int], encoded: list[tuple[list[int], list[int]]]) -> dict[str, np.ndarray]:
        """The arrays of a batch, filled up with rows without targets."""
        blank = self._batch_size - len(pictures)
        pictures, encoded = pictures + [0] * blank, encoded + [([self._text.prefix[0]], [IGNORE])] * blank
        length = min(-(-max(len(ids) for ids, _ in encoded) // MULTIPLE) * MULTIPLE, self._text.max_tokens)
        ids, targets = zip(*encoded, strict=True)
        batch = {
            "picture": np.array(pictures, np.int32),
            "ids": pad(ids, length, self._text.pad_id),
            "mask": pad([[1] * len(row) for row in ids], length, 0),
            "targets": pad(targets, length, IGNORE),
        }
        if self._mesh is None:
            return batch
        own = list(meshes.local_rows(self._mesh, self._batch_size))
        return meshes.put_batch({name: array[own] for name, array in batch.items()}, self._mesh)


likelihood_of = functools.lru_cache(maxsize=4)(Likelihood)  # evaluations share one, which is compiled once


def loglikelihood(
    task: Task, params: dict, requests: Sequence[tuple[np.ndarray, str, str]], batch_size: int = 32
) -> list[tuple[float, bool]]:
    """Returns how likely texts are that continue prompts about pictures, for other programs that rank answers.

    A space that the text begins with is the one that separates it from the prompt. Equal pictures are encoded once.
    As in training, a prompt that is longer than `llm.max_text_tokens` loses its left side.

    Args:
      task: the model, for example that of `load("example")`.
      params: its parameters.
      requests: (picture, prompt, text) each; pictures are uint8 (S, S, 3) of the model's side, or clips (F, S, S, 3).
      batch_size: pictures and texts that go through the model at once.

    Returns:
      For each request the log-likelihood of the text, in nats, summed over its tokens without an end token, and
      whether each of its tokens is the likeliest one, so that greedy decoding would write the text.
    """
    likelihood = likelihood_of(task.model, task.batch.texts["caption"].encoder, batch_size, end=False)
    places: dict[bytes, list[int]] = {}  # digest of a picture -> its requests
    for place, (picture, _, _) in enumerate(requests):
        places.setdefault(hashlib.blake2b(np.ascontiguousarray(picture)).digest(), []).append(place)
    groups, found = list(places.values()), {}
    for start in range(0, len(groups), batch_size):
        group = groups[start : start + batch_size]
        images = np.stack([requests[own[0]][0] for own in group])
        images = np.concatenate([images, np.zeros((batch_size - len(images), *images.shape[1:]), images.dtype)])
        order = [(number, place) for number, own in enumerate(group) for place in own]
        queries = [Query(number, *_separated(*requests[place][1:])) for number, place in order]
        likely = likelihood(params, likelihood.encode(params, images), queries)
        found |= {place: (one.nats, one.greedy) for (_, place), one in zip(order, likely, strict=True)}
    return [found[place] for place in range(len(requests))]


def _separated(prompt: str, text: str) -> tuple[str, str]:
    return prompt, text.removeprefix(" ") if prompt.strip() else text
