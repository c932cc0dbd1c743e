"""The training step: one pure function of state, frozen parameters and a batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from simvlg_jax.models.contrastive import Pair
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.tasks import params as partition
from simvlg_jax.tasks.task import CONTRAST, Task


@struct.dataclass
class TrainState:
    """The state that training changes.

    Attributes:
      step: () int32, number of optimizer steps done.
      params: float32 tree of the trained parameters.
      opt_state: state of the optimizer.
      average: moving average of `params` over the steps, if there is one; see `moving_average`.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    average: dict | None = None

    @property
    def final(self) -> dict:
        """The trained parameters that are evaluated and exported."""
        return self.params if self.average is None else self.average


def moving_average(average: dict, params: dict, step: jax.Array, decay: float) -> dict:
    """Returns decay * average + (1 - decay) * params, after `step` earlier steps.

    At first the decay is (1 + step) / (10 + step), if that is less, so that initial weights are soon forgotten.
    """
    kept = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return optax.tree.add(optax.tree.scale(kept, average), optax.tree.scale(1.0 - kept, params))


Step = Callable[[TrainState, dict, dict], tuple[TrainState, dict[str, jax.Array]]]


def make_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    lr: optax.Schedule,
    mesh: Mesh,
    *,
    seed: int,
    accumulate: int,
    ema: float = 0.0,
) -> Step:
    """Returns the step: (state, frozen, batch) -> (state, metrics).

    The metrics are loss, grad_norm, lr, what the task only logs and, if there are several losses, each of them.

    A loss is the mean over all targets of the global batch, whatever the number of devices and micro-batches (the
    published code averages the ranks' means instead). The contrastive loss of a task is over the global batch too,
    without the rows of weight 0. With several micro-batches, a first pass embeds all of them and computes the gradient
    of the loss with respect to each embedding. A second pass backpropagates these gradients to the parameters
    (GradCache, arXiv 2101.06983). Both passes use the same dropout masks.

    Args:
      seed: of the dropout. The numbers of the step and of the micro-batch are folded in.
      accumulate: micro-batches per step.
      ema: decay of the average of the trained parameters, if the state has one.
    """
    contrast = task.contrast

    def split(x: jax.Array, packs: int) -> jax.Array:
        """(B, ...) -> (accumulate, B / accumulate, ...). Pack i goes to micro-batch i % accumulate on its device."""
        apart = x.reshape(packs // accumulate, accumulate, len(x) // packs, *x.shape[1:]).swapaxes(0, 1)
        return apart.reshape(accumulate, -1, *x.shape[1:])

    def unsplit(x: jax.Array, packs: int) -> jax.Array:
        """The inverse of `split`."""
        together = x.reshape(accumulate, packs // accumulate, -1, *x.shape[2:]).swapaxes(0, 1)
        return together.reshape(-1, *x.shape[2:])

    def weighted(losses: dict[str, jax.Array]) -> jax.Array:
        return sum(task.weights[name] * loss for name, loss in losses.items() if name in task.weights)

    def contrastive_loss(params: dict, frozen: dict, pair: Pair, weight: jax.Array) -> dict[str, jax.Array]:
        losses = contrast.losses(partition.join(frozen, params), *pair, weight)
        return {CONTRAST: losses.sum() / jnp.maximum(weight.sum(), 1.0)}

    def total_loss(
        params: dict, frozen: dict, batch: dict, key: jax.Array, counts: dict[str, jax.Array], pair_grads: Pair | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns (the value to differentiate, the losses by name). Both are summed over micro-batches.

        Args:
          counts: the number of targets of each loss in the global batch.
          pair_grads: gradient of the weighted contrastive loss with respect to the pair of this micro-batch, from the
            first pass. None if there was no first pass; a contrastive loss is then computed here.
        """
        with meshes.activation_shardings(mesh):
            values, pair = task.losses(partition.join(frozen, params), batch, key)
            losses = {name: value.sum() / counts[name] for name, value in values.items()}
            if pair_grads is not None:
                # The gradient of this sum with respect to the pair is `pair_grads`.
                surrogate = sum(jnp.sum(x * grad) for x, grad in zip(pair, pair_grads, strict=True))
                return weighted(losses) + surrogate, losses
            if contrast:
                losses |= contrastive_loss(params, frozen, pair, batch["weight"])
        return weighted(losses), losses

    def contrast_micro_batches(
        params: dict, frozen: dict, micro: dict, key: jax.Array, packs: int
    ) -> tuple[dict[str, jax.Array], dict, Pair]:
        """Returns the contrastive loss over all micro-batches, and its gradients for the params and for the pairs."""

        def embed(item: tuple[jax.Array, dict]) -> Pair:
            index, rows = item
            return contrast.embed(partition.join(frozen, params), rows, jax.random.fold_in(key, index))

        def loss(params: dict, pairs: Pair) -> tuple[jax.Array, dict[str, jax.Array]]:
            pair, weight = jax.tree.map(lambda x: unsplit(x, packs), (pairs, micro["weight"]))
            losses = contrastive_loss(params, frozen, pair, weight)
            return weighted(losses), losses

        with meshes.activation_shardings(mesh):
            pairs = jax.lax.map(embed, (jnp.arange(accumulate), micro))
            (_, losses), (grads, pair_grads) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, pairs)
        return losses, grads, pair_grads

    def loss_and_grads(params: dict, frozen: dict, batch: dict, key: jax.Array) -> tuple[dict[str, jax.Array], dict]:
        counts = {name: jnp.maximum(count.sum(), 1.0) for name, count in task.counts(batch, True).items()}
        packs = min(map(len, batch.values()))  # each has its own row of text, and one or several pictures
        micro = jax.tree.map(lambda x: split(x, packs), batch)

        def micro_batch(
            index: jax.Array | int, rows: dict, pair_grads: Pair | None
        ) -> tuple[dict[str, jax.Array], dict]:
            key_of_rows = jax.random.fold_in(key, index)
            grad = jax.value_and_grad(total_loss, has_aux=True)
            (_, losses), grads = grad(params, frozen, rows, key_of_rows, counts, pair_grads)
            return losses, grads

        if accumulate == 1:
            return micro_batch(0, jax.tree.map(lambda x: x[0], micro), None)
        contrastive, grads, pair_grads = {}, jax.tree.map(jnp.zeros_like, params), None
        if contrast:
            contrastive, grads, pair_grads = contrast_micro_batches(params, frozen, micro, key, packs)
        zeros = {name: jnp.zeros(()) for name in counts}
        (losses, grads), _ = jax.lax.scan(
            lambda total, item: (jax.tree.map(jnp.add, total, micro_batch(*item)), None),
            (zeros, grads),
            (jnp.arange(accumulate), micro, pair_grads),
        )
        return losses | contrastive, grads

    def run(state: TrainState, frozen: dict, batch: dict) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        losses, grads = loss_and_grads(state.params, frozen, batch, key)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics = {"loss": weighted(losses), "grad_norm": optax.tree.norm(grads), "lr": lr(state.step)}
        for name, value in losses.items():
            if name not in task.weights:
                metrics[name] = value
            elif len(task.weights) > 1:
                metrics[f"loss/{name}"] = value
        average = state.average
        if average is not None:
            average = moving_average(average, params, state.step, ema)
        return TrainState(state.step + 1, params, opt_state, average), metrics

    return run
