"""What is trained: the one thing that the step, the loop, checkpoints, evaluation and compiling ahead of time know."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from simvlg_jax.data.batch import BatchSpec
from simvlg_jax.models.contrastive import Pair
from simvlg_jax.tasks.params import Rule, find_rule

CONTRAST = "contrastive"  # the name of the loss across examples

Params = dict
Arrays = Mapping[str, jax.Array]


class Losses(NamedTuple):
    """What a task makes of a batch.

    Attributes:
      values: name -> (B,), summed over each example's targets.
      pair: the embeddings that `Task.contrast` compares, if there is one; None in evaluation.
    """

    values: dict[str, jax.Array]
    pair: Pair | None = None


@dataclass(frozen=True)
class Contrast:
    """A loss that compares every example of the global batch with all others.

    Attributes:
      embed: (params, batch, dropout key) -> the pair that `Task.losses` gives for the same, without the losses.
      losses: (params, picture (B, S), text (B, S), weight (B,)) -> (B,), B the global batch; 0 where the weight is 0.
    """

    embed: Callable[[Params, Arrays, jax.Array | None], Pair]
    losses: Callable[[Params, jax.Array, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model and how it is trained.

    Attributes:
      model: the Linen module.
      batch: the layout of its batches.
      rules: how each parameter is trained, see `params.Rule`.
      initialize: (key, batch of one example) -> parameters, boxed with their logical axes.
      losses: (params, batch, dropout key, or None in evaluation) -> `Losses`.
      counts: (batch, whether in training) -> name -> (B,), what each value of `losses` is divided by: its targets.
      weights: name -> weight of the mean of a loss, over the targets of the global batch, in the loss that is trained;
        CONTRAST names the mean of `contrast` over the examples of weight 1. Values of `losses` without one are logged.
      load_pretrained: abstract parameters -> {top-level name: lazy or host arrays} of those with named weights.
      sources: top-level name -> where its frozen weights come from, in words.
      evaluator: the type of evaluation that a config need not name, see `evaluation.EVALUATORS`.
      contrast: the loss across examples, if there is one.
      ranking: what the evaluation "retrieval" embeds and reports, if that is no `contrast`: a picture may have several
        embeddings (B, Q, S), the nearest of which counts.
      captions: whether the model writes captions.
      elastic: this task with each of the numbers of visual tokens that training draws from, the smallest first; empty
        if it draws none.
      after_run: called with the trained parameters, on the host of process 0, and the workdir when a run ends.
    """

    model: nn.Module
    batch: BatchSpec
    rules: Sequence[Rule]
    initialize: Callable[[jax.Array, Arrays], Params]
    losses: Callable[[Params, Arrays, jax.Array | None], Losses]
    counts: Callable[[Arrays, bool], dict[str, jax.Array]]
    weights: Mapping[str, float]
    load_pretrained: Callable[[Params], Params]
    sources: Mapping[str, str]
    evaluator: str
    contrast: Contrast | None = None
    ranking: Contrast | None = None
    captions: bool = False
    elastic: Sequence["Task"] = ()
    after_run: Callable[[Params, Path], None] | None = None

    def init(self, key: jax.Array) -> Params:
        """Random parameters, boxed with their logical axes; traceable."""
        shapes = self.batch.shapes(1, lengths=1)
        return self.initialize(key, {name: jnp.ones(shape, dtype) for name, (shape, dtype) in shapes.items()})

    @cached_property
    def evaluation_losses(self) -> Callable[[Params, Arrays], tuple[dict[str, jax.Array], dict[str, jax.Array]]]:
        """(parameters, batch) -> (losses, counts) in evaluation, by name; jitted once for all evaluations."""
        return jax.jit(lambda params, batch: (self.losses(params, batch, None).values, self.counts(batch, False)))

    def rule(self, path: tuple[str, ...]) -> Rule:
        """How the parameter at a path is trained. Raises UserError if not exactly one rule matches."""
        return find_rule(self.rules, path)

    def is_trained(self, path: tuple[str, ...]) -> bool:
        return self.rule(path).trained
