"""The training step: one pure function with its placements, for training and for ahead-of-time compiling."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct, traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simvlg_jax.models.contrastive import Pair
from simvlg_jax.parallel import lazy
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.tasks import params as partition
from simvlg_jax.tasks.task import Task
from simvlg_jax.training.optimizer import learning_rate, make_optimizer
from simvlg_jax.utils.errors import UserError


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
    micro-batches (the published code averages the ranks' means instead). A task's contrast is over the global batch
    too: with several micro-batches a first pass embeds them all, which gives the slope of the loss along each
    embedding, and a second one carries the slopes on to the parameters (GradCache, arXiv 2101.06983). Both draw the
    same dropout.

    Args:
      states: the TrainState's placements.
      frozen_shardings: the frozen tree's placements.
      seed: dropout's; each step and micro-batch folds its own number in.
      accumulate: micro-batches per step.
    """
    contrast = task.contrast

    def split(x: jax.Array) -> jax.Array:
        """(B, ...) -> (accumulate, B / accumulate, ...). Each device keeps its own rows, dealt out one by one."""
        return x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)

    def unsplit(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    def contrastive_loss(params: dict, frozen: dict, pair: Pair, weight: jax.Array) -> jax.Array:
        """Of the global batch's pair, to stand beside losses summed over `weight` targets."""
        return contrast.weight * weight * contrast.losses(partition.join(frozen, params), *pair).mean()

    def total_loss(
        params: dict, frozen: dict, batch: dict, key: jax.Array, slopes: Pair | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """(what is differentiated, (the loss in it, the number of targets)), summed over targets.

        Args:
          slopes: the contrastive loss's along the batch's pair, if it is part of a greater one whose loss is known.
        """
        with meshes.activation_shardings(mesh):
            losses, counts, pair = task.losses(partition.join(frozen, params), batch, key)
            loss, weight = losses.sum(), counts.sum()
            if slopes is not None:
                return loss + sum(jnp.sum(x * slope) for x, slope in zip(pair, slopes, strict=True)), (loss, weight)
            if contrast:
                loss += contrastive_loss(params, frozen, pair, weight)
        return loss, (loss, weight)

    def contrast_micro_batches(
        params: dict, frozen: dict, micro: dict, key: jax.Array, weight: jax.Array
    ) -> tuple[jax.Array, tuple[dict, Pair]]:
        """The contrastive loss over all micro-batches, and its slopes along params and along each one's pair."""

        def embed(item: tuple[jax.Array, dict]) -> Pair:
            index, rows = item
            return contrast.embed(partition.join(frozen, params), rows, jax.random.fold_in(key, index))

        def loss(params: dict, pairs: Pair) -> jax.Array:
            return contrastive_loss(params, frozen, jax.tree.map(unsplit, pairs), weight)

        with meshes.activation_shardings(mesh):
            return jax.value_and_grad(loss, (0, 1))(params, jax.lax.map(embed, (jnp.arange(accumulate), micro)))

    def run(state: TrainState, frozen: dict, batch: dict) -> tuple[TrainState, dict[str, jax.Array]]:
        micro = jax.tree.map(split, batch)
        step_key = jax.random.fold_in(jax.random.key(seed), state.step)

        def add_micro_batch(carry, item):
            index, rows, slopes = item
            (_, (loss, weight)), grads = jax.value_and_grad(total_loss, has_aux=True)(
                state.params, frozen, rows, jax.random.fold_in(step_key, index), slopes
            )
            return jax.tree.map(jnp.add, carry, (loss, weight, grads)), None

        loss, grads, slopes = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params), None
        if contrast and accumulate > 1:
            weight = contrast.counts(batch).sum()
            loss, (grads, slopes) = contrast_micro_batches(state.params, frozen, micro, step_key, weight)
        total = (loss, jnp.zeros(()), grads)
        if accumulate == 1:
            (loss, weight, grads), _ = add_micro_batch(total, (0, jax.tree.map(lambda x: x[0], micro), None))
        else:
            (loss, weight, grads), _ = jax.lax.scan(add_micro_batch, total, (jnp.arange(accumulate), micro, slopes))
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


class Plan(NamedTuple):
    """Everything about a step that is known before a single weight is: training and compiling ahead both start here.

    Attributes:
      step: the step with its placements.
      init_state: trained parameters -> TrainState at step 0, in place.
      abstract: (TrainState, frozen tree) of ShapeDtypeStructs with their shardings.
    """

    step: Step
    init_state: Callable[[dict], TrainState]
    abstract: tuple[TrainState, dict]

    def abstract_batch(self, task: Task, batch_size: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch of the longest texts, as `data.pipeline` makes them."""
        shapes = {"image": ((batch_size, task.image_size, task.image_size, 3), jnp.uint8)}
        text = ((batch_size, task.max_tokens), jnp.int32)
        names = ("ids", "mask", "targets") + ("sentence_ids", "sentence_mask") * bool(task.load_sentence_text)
        shapes |= dict.fromkeys(names, text)
        sharding = meshes.batch_sharding(mesh)
        return {name: jax.ShapeDtypeStruct(*each, sharding=sharding) for name, each in shapes.items()}


def make_plan(task: Task, config: ConfigDict, mesh: Mesh) -> Plan:
    """The step of a config on a mesh of devices, which need not be there.

    Raises:
      UserError (status 2): a batch that the mesh and the micro-batches do not divide.
    """
    shards, size, micro = meshes.batch_shards(mesh), config.train.batch_size, config.train.accumulate
    if size % (micro * shards):
        raise UserError(f"train.batch_size {size} does not divide over {shards} devices times {micro} micro-batches", 2)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    lr = learning_rate(config.optimizer, config.train.steps)

    def init_state(params: dict) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    shapes, shardings = placements(task, config, mesh)
    (params, frozen), (param_shardings, frozen_shardings) = (
        partition.split(tree, task.is_trained) for tree in (shapes, shardings)
    )
    state = jax.eval_shape(init_state, params)
    states = state_shardings(optimizer, state, param_shardings, mesh)
    step = make_step(task, optimizer, lr, mesh, states, frozen_shardings, seed=config.seed, accumulate=micro)

    def place(x: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    abstract = jax.tree.map(place, (state, frozen), (states, frozen_shardings))
    return Plan(step, jax.jit(init_state, out_shardings=states), abstract)


def placements(task: Task, config: ConfigDict, mesh: Mesh) -> tuple[dict, dict]:
    """ShapeDtypeStructs of all parameters, trained ones float32 and frozen ones as configured, and their shardings."""
    boxed = jax.eval_shape(task.init, jax.random.key(0))
    split = {True: config.mesh.split_trained, False: config.mesh.split_frozen}
    shardings = meshes.param_shardings(boxed, mesh, lambda path: split[task.is_trained(path)])
    dtypes = {True: jnp.float32, False: jnp.dtype(config.frozen_dtype)}
    flat = traverse_util.flatten_dict(nn.unbox(boxed))
    shapes = {path: jax.ShapeDtypeStruct(x.shape, dtypes[task.is_trained(path)]) for path, x in flat.items()}
    return traverse_util.unflatten_dict(shapes), shardings


def init_params(task: Task, config: ConfigDict, mesh: Mesh) -> tuple[dict, dict]:
    """Trained and frozen parameters in place on the mesh: loaded where weights are named, else initialised.

    Nothing is ever whole on one device that the mesh splits: loaded arrays go straight to their shards, and the
    rest is initialised under jit into its own.
    """
    shapes, shardings = placements(task, config, mesh)
    loaded = traverse_util.flatten_dict(task.load_pretrained(shapes))
    dtypes = {path: x.dtype for path, x in traverse_util.flatten_dict(shapes).items()}
    places = traverse_util.flatten_dict(shardings)
    missing = [path for path in places if path not in loaded]
    params = {path: lazy.put(x.astype(dtypes[path]), places[path]) for path, x in loaded.items()}
    if missing:

        def init_missing(key: jax.Array) -> dict:
            fresh = traverse_util.flatten_dict(nn.unbox(task.init(key)))
            return {path: fresh[path].astype(dtypes[path]) for path in missing}

        key = jax.random.key(config.seed)
        params |= jax.jit(init_missing, out_shardings={path: places[path] for path in missing})(key)
    return partition.split(traverse_util.unflatten_dict(params), task.is_trained)
