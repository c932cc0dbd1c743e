"""The training step: one pure function with its placements, for training and for ahead-of-time compiling."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct, traverse_util
from jax.sharding import Mesh

from simvlg_jax.convert import lazy
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.training import partition
from simvlg_jax.training.tasks import Task


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


class Step(NamedTuple):
    """run(state, frozen, batch) -> (state, {"loss", "grad_norm", "lr"}), ready for `jax.jit` with its placements."""

    run: Callable
    in_shardings: tuple
    out_shardings: tuple
    donate_argnums: tuple[int, ...] = (0,)

    def jit(self) -> jax.stages.Wrapped:
        return jax.jit(
            self.run,
            in_shardings=self.in_shardings,
            out_shardings=self.out_shardings,
            donate_argnums=self.donate_argnums,
        )


def state_shardings(
    optimizer: optax.GradientTransformation, abstract: TrainState, params: dict, mesh: Mesh
) -> TrainState:
    """Placements of a TrainState: moments live where their parameters do, counters everywhere."""
    everywhere = meshes.replicated(mesh)
    opt_state = optax.tree.map_params(
        optimizer, lambda _, s: s, abstract.opt_state, params, transform_non_params=lambda _: everywhere
    )
    return TrainState(everywhere, params, opt_state)


def make_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    lr: optax.Schedule,
    mesh: Mesh,
    states: TrainState,
    frozen_shardings,
    *,
    seed: int,
    accumulate: int,
) -> Step:
    """Builds the step.

    The loss is the mean over all targets of the global batch, whatever the number of devices and of
    micro-batches (the published code averages the ranks' means instead).

    Args:
      states: the TrainState's placements.
      frozen_shardings: the frozen tree's placements.
      seed: dropout's; each step and micro-batch folds its own number in.
      accumulate: micro-batches per step.
    """

    def total_loss(params: dict, frozen: dict, batch: dict, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses, weights = task.losses(partition.join(frozen, params), batch, key)
        return losses.sum(), weights.sum()

    def run(state: TrainState, frozen: dict, batch: dict) -> tuple[TrainState, dict[str, jax.Array]]:
        # Each device keeps its own rows: micro-batch i takes every accumulate-th.
        micro = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
        step_key = jax.random.fold_in(jax.random.key(seed), state.step)

        def add_micro_batch(carry, item):
            index, rows = item
            (loss, weight), grads = jax.value_and_grad(total_loss, has_aux=True)(
                state.params, frozen, rows, jax.random.fold_in(step_key, index)
            )
            return jax.tree.map(jnp.add, carry, (loss, weight, grads)), None

        zero = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
        if accumulate == 1:
            (loss, weight, grads), _ = add_micro_batch(zero, (0, jax.tree.map(lambda x: x[0], micro)))
        else:
            (loss, weight, grads), _ = jax.lax.scan(add_micro_batch, zero, (jnp.arange(accumulate), micro))
        weight = jnp.maximum(weight, 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {"loss": loss / weight, "grad_norm": optax.tree.norm(grads), "lr": lr(state.step)}
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), metrics

    everywhere = meshes.replicated(mesh)
    return Step(
        run,
        in_shardings=(states, frozen_shardings, meshes.batch_sharding(mesh)),
        out_shardings=(states, everywhere),
    )


def init_params(task: Task, mesh: Mesh, key: jax.Array, frozen_dtype: jnp.dtype) -> tuple[dict, dict]:
    """Trained and frozen parameters in place on the mesh: loaded where weights are named, else initialised.

    Nothing is ever whole on one device that the mesh splits: loaded arrays go straight to their shards, and the
    rest is initialised under jit into its own.
    """
    boxed = jax.eval_shape(task.init, key)
    abstract, shardings = nn.unbox(boxed), meshes.param_shardings(boxed, mesh)
    places = traverse_util.flatten_dict(shardings)
    loaded = traverse_util.flatten_dict(task.load_pretrained(abstract))
    missing = [path for path in places if path not in loaded]

    def cast(path: tuple[str, ...], x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32 if task.is_trained(path) else frozen_dtype)

    params = {path: lazy.put(cast(path, x), places[path]) for path, x in loaded.items()}
    if missing:

        def init_missing(key: jax.Array) -> dict:
            fresh = traverse_util.flatten_dict(nn.unbox(task.init(key)))
            return {path: cast(path, fresh[path]) for path in missing}

        params |= jax.jit(init_missing, out_shardings={path: places[path] for path in missing})(key)
    return partition.split(traverse_util.unflatten_dict(params), task.is_trained)
