"""The step of a run before any weight exists: shapes, shardings and the jitted function.

Training and ahead-of-time (AOT) compilation both use it.
"""

from functools import cached_property

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from simvlg_jax.data.batch import Pack
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.tasks import params as partition
from simvlg_jax.tasks.task import Task
from simvlg_jax.training import storage
from simvlg_jax.training.optimizer import learning_rate, make_optimizer
from simvlg_jax.training.step import TrainState, make_step
from simvlg_jax.utils.errors import UserError

Path = tuple[str, ...]


class Plan:
    """The step of a config on a mesh. For AOT compilation the devices of the mesh need not be attached.

    Attributes:
      task, mesh: as given.
      tasks: what a step trains: the task, or each of `task.elastic`.
      shapes: ShapeDtypeStructs with shardings of all parameters: trained ones float32, frozen ones as configured; see
        `storage.stored`.
      shardings: NamedShardings of all parameters.

    Raises:
      UserError (status 2): the mesh and the micro-batches do not divide the batch.
      UserError: a parameter is matched by no rule of the task, or by several.
    """

    def __init__(self, task: Task, config: ConfigDict, mesh: Mesh):
        shards, size, micro = meshes.batch_shards(mesh), config.train.batch_size, config.train.accumulate
        if size % (micro * shards):
            raise UserError(
                f"train.batch_size {size} does not divide over {shards} devices times {micro} micro-batches", 2
            )
        self.task, self.mesh = task, mesh
        self.tasks = task.elastic or (task,)
        self._seed, self._steps, self._optimizer_config = config.seed, config.train.steps, config.optimizer
        self._accumulate, self._ema = micro, config.train.ema
        self._init = jax.jit(task.init)  # jitted, so that it is traced once for the shapes and the values
        boxed = jax.eval_shape(self._init, jax.random.key(0))
        partition.check_rules(task.rules, traverse_util.flatten_dict(boxed))
        self.shapes: dict = storage.stored(boxed, task, config, mesh)
        self.shardings: dict = storage.shardings(self.shapes)

    def init_params(self, loaded: dict | None = None) -> tuple[dict, dict]:
        """Returns the sharded trained and frozen parameters: loaded if the config names weights, else initialised.

        A sharded array is never whole on one device: loaded arrays are put directly into their shards, and the others
        are initialised under jit with their shardings.

        Args:
          loaded: what `task.load_pretrained` gave for `shapes`; None: it is called here.
        """
        loaded = traverse_util.flatten_dict(self.task.load_pretrained(self.shapes) if loaded is None else loaded)
        shapes = traverse_util.flatten_dict(self.shapes)
        missing = {path: x for path, x in shapes.items() if path not in loaded}
        params = {path: storage.put(x, shapes[path]) for path, x in loaded.items()}
        if missing:

            def init_missing(key: jax.Array) -> dict[Path, jax.Array]:
                fresh = traverse_util.flatten_dict(nn.unbox(self._init(key)))
                return {path: storage.fresh(fresh[path], x) for path, x in missing.items()}

            key = jax.random.key(self._seed)
            params |= jax.jit(init_missing, out_shardings=storage.shardings(missing))(key)
        return self._split(traverse_util.unflatten_dict(params))

    def init_state(self, params: dict) -> TrainState:
        """Returns the sharded TrainState at step 0 for trained parameters."""
        return jax.jit(self._init_state, out_shardings=self._state_shardings)(params)

    @cached_property
    def steps(self) -> list[jax.stages.Wrapped]:
        """Of each of `tasks` the function of `step.make_step`, jitted with its shardings.

        It donates the memory of the state.
        """
        return [self._step(task) for task in self.tasks]

    @property
    def step(self) -> jax.stages.Wrapped:
        """The step with the most visual tokens."""
        return self.steps[-1]

    def _step(self, task: Task) -> jax.stages.Wrapped:
        run = make_step(
            task,
            self._optimizer,
            learning_rate(self._optimizer_config, self._steps),
            self.mesh,
            seed=self._seed,
            accumulate=self._accumulate,
            ema=self._ema,
        )
        states, replicated = self._state_shardings, meshes.replicated(self.mesh)
        return jax.jit(
            run,
            in_shardings=(states, self._split(self.shardings)[1], meshes.batch_sharding(self.mesh)),
            out_shardings=(states, replicated),
            donate_argnums=0,
        )

    @cached_property
    def abstract(self) -> tuple[TrainState, dict]:
        """(TrainState, frozen tree) of ShapeDtypeStructs with their shardings."""

        def place(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        params, frozen = self._split(self.shapes)
        return jax.tree.map(place, jax.eval_shape(self._init_state, params), self._state_shardings), frozen

    def abstract_batch(self, batch_size: int, pack: Pack | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns ShapeDtypeStructs of a batch as the step takes it, packed or with the longest texts."""
        sharding = meshes.batch_sharding(self.mesh)
        shapes = self.task.batch.step_shapes(batch_size, pack)
        return {name: jax.ShapeDtypeStruct(*each, sharding=sharding) for name, each in shapes.items()}

    @cached_property
    def _optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self._optimizer_config, self._steps, self.task.rule)

    def _init_state(self, params: dict) -> TrainState:
        average = jax.tree.map(jnp.copy, params) if self._ema else None
        return TrainState(jnp.zeros((), jnp.int32), params, self._optimizer.init(params), average)

    @cached_property
    def _state_shardings(self) -> TrainState:
        """Moments and averages have the shardings of their parameters; counters are replicated."""
        replicated = meshes.replicated(self.mesh)
        state = jax.eval_shape(self._init_state, self._split(self.shapes)[0])
        params = self._split(self.shardings)[0]
        opt_state = optax.tree.map_params(
            self._optimizer, lambda _, s: s, state.opt_state, params, transform_non_params=lambda _: replicated
        )
        return TrainState(replicated, params, opt_state, params if self._ema else None)

    def _split(self, tree: dict) -> tuple[dict, dict]:
        return partition.split(tree, self.task.is_trained)
