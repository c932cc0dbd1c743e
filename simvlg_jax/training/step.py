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
    """What changes while training.

    Attributes:
      step: () int32, optimizer steps done.
      params: float32 trees of the trained parameters.
      opt_state: the optimizer's.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState


Step = Callable[[TrainState, dict, dict], tuple[TrainState, dict[str, jax.Array]]]


def make_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    lr: optax.Schedule,
    mesh: Mesh,
    *,
    seed: int,
    accumulate: int,
) -> Step:
    """Builds the step: (state, frozen, batch) -> (state, metrics): loss, grad_norm, lr, and each of several losses.

    A loss is the mean over all targets of the global batch, whatever the number of devices and of micro-batches (the
    published code averages the ranks' means instead). A task's contrast is over the global batch too: with several
    micro-batches a first pass embeds them all, which gives the slope of the loss along each embedding, and a second
    pass carries the slopes on to the parameters (GradCache, arXiv 2101.06983). Both draw the same dropout.

    Args:
      seed: dropout's; each step and micro-batch folds its own number in.
      accumulate: micro-batches per step.
    """
    contrast = task.contrast

    def split(x: jax.Array) -> jax.Array:
        """(B, ...) -> (accumulate, B / accumulate, ...). Each device keeps its own rows, dealt out one by one."""
        return x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)

    def unsplit(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    def weighted(losses: dict[str, jax.Array]) -> jax.Array:
        return sum(task.weights[name] * loss for name, loss in losses.items())

    def contrastive_loss(params: dict, frozen: dict, pair: Pair) -> dict[str, jax.Array]:
        return {CONTRAST: contrast.losses(partition.join(frozen, params), *pair).mean()}

    def total_loss(
        params: dict, frozen: dict, batch: dict, key: jax.Array, counts: dict[str, jax.Array], slopes: Pair | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(what is differentiated, the losses in it by name); their sum over micro-batches is the step's.

        Args:
          counts: the number of targets of each loss in the global batch.
          slopes: the contrastive loss's along the batch's pair, if it is part of a greater one whose loss is known.
        """
        with meshes.activation_shardings(mesh):
            values, pair = task.losses(partition.join(frozen, params), batch, key)
            losses = {name: value.sum() / counts[name] for name, value in values.items()}
            if slopes is not None:
                carried = sum(jnp.sum(x * slope) for x, slope in zip(pair, slopes, strict=True))
                return weighted(losses) + carried, losses
            if contrast:
                losses |= contrastive_loss(params, frozen, pair)
        return weighted(losses), losses

    def contrast_micro_batches(
        params: dict, frozen: dict, micro: dict, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict, Pair]:
        """The contrastive loss over all micro-batches, and its slopes along params and along each one's pair."""

        def embed(item: tuple[jax.Array, dict]) -> Pair:
            index, rows = item
            return contrast.embed(partition.join(frozen, params), rows, jax.random.fold_in(key, index))

        def loss(params: dict, pairs: Pair) -> tuple[jax.Array, dict[str, jax.Array]]:
            losses = contrastive_loss(params, frozen, jax.tree.map(unsplit, pairs))
            return weighted(losses), losses

        with meshes.activation_shardings(mesh):
            pairs = jax.lax.map(embed, (jnp.arange(accumulate), micro))
            (_, losses), (grads, slopes) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, pairs)
        return losses, grads, slopes

    def loss_and_grads(params: dict, frozen: dict, batch: dict, key: jax.Array) -> tuple[dict[str, jax.Array], dict]:
        counts = {name: jnp.maximum(count.sum(), 1.0) for name, count in task.counts(batch).items()}
        micro = jax.tree.map(split, batch)

        def micro_batch(index: jax.Array | int, rows: dict, slopes: Pair | None) -> tuple[dict[str, jax.Array], dict]:
            key_of_rows = jax.random.fold_in(key, index)
            grad = jax.value_and_grad(total_loss, has_aux=True)
            (_, losses), grads = grad(params, frozen, rows, key_of_rows, counts, slopes)
            return losses, grads

        if accumulate == 1:
            return micro_batch(0, jax.tree.map(lambda x: x[0], micro), None)
        across, grads, slopes = {}, jax.tree.map(jnp.zeros_like, params), None
        if contrast:
            across, grads, slopes = contrast_micro_batches(params, frozen, micro, key)
        zeros = {name: jnp.zeros(()) for name in counts}
        (losses, grads), _ = jax.lax.scan(
            lambda total, item: (jax.tree.map(jnp.add, total, micro_batch(*item)), None),
            (zeros, grads),
            (jnp.arange(accumulate), micro, slopes),
        )
        return losses | across, grads

    def run(state: TrainState, frozen: dict, batch: dict) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        losses, grads = loss_and_grads(state.params, frozen, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {"loss": weighted(losses), "grad_norm": optax.tree.norm(grads), "lr": lr(state.step)}
        if len(losses) > 1:
            metrics |= {f"loss/{name}": loss for name, loss in losses.items()}
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics

    return run
