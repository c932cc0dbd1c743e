"""Time and FLOPs of the parts of a training step, each compiled on its own.

One forward pass records what ViT, connector and language model get and give (`calls`). Each part then runs over these
arrays, with their shapes, dtypes and shardings, and what comes before it is replaced by its recorded result:

    ViT            its call; with a backward pass only if it is trained
    connector      `encode_image` after the ViT: ln_vision, connector and projection, forward and backward
    merge          of the connector: matching and merging in all layers, forward and backward
    LLM forward    its call
    LLM backward   forward and backward in one program, less the forward pass. A backward pass on its own would get all
                   kept activations as arguments, and within the step they never leave the program.
    head and loss  `Task.losses` after the language model, forward and backward; with train.beta also the embeddings of
                   the contrastive loss, whose comparison of all examples is in no part
    optimizer      clipping, AdamW and the addition to the parameters

A backward pass computes the gradients that the step needs: those of the trained parameters and of the activations
between them. The step fuses operations of different parts, so the parts need not add up to it. With micro-batches a
part runs on one of them, and its time and FLOPs are multiplied by their number.
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
import optax

from simvlg_jax.benchmark.calls import Name, recorded, replacing
from simvlg_jax.benchmark.passes import make_passes
from simvlg_jax.benchmark.setting import Setting
from simvlg_jax.benchmark.timing import compiled_seconds
from simvlg_jax.models import token_merging
from simvlg_jax.models.connectors.connector import Connector
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.tasks import params as partition
from simvlg_jax.training.flops import count_flops
from simvlg_jax.training.optimizer import make_optimizer

VIT, VISUAL, LLM = ("vit", "encode"), ("", "encode_image"), ("llm", "__call__")
VISUAL_PARAMS = ("frame_embedding", "frame_weight", "ln_vision", "connector", "llm_proj")


class Cost(NamedTuple):
    """Seconds, and FLOPs of the matrix products over all devices."""

    seconds: float
    flops: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds + other.seconds, self.flops + other.flops)

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds - other.seconds, self.flops - other.flops)

    def times(self, number: int) -> "Cost":
        return Cost(self.seconds * number, self.flops * number)


class Both(NamedTuple):
    """The cost of a forward pass, and of forward and backward pass together."""

    forward: Cost
    total: Cost


class Parts:
    """Measures the parts of the step on a batch that is on the devices.

    Args:
      repeats: a time is the median of so many.
    """

    def __init__(self, setting: Setting, batch: dict[str, jax.Array], repeats: int):
        self._setting, self._repeats, self._times = setting, repeats, setting.config.train.accumulate
        self._task, self._model = setting.task, setting.task.model
        micro_batch = jax.jit(lambda x: jax.tree.map(lambda a: a.reshape(-1, self._times, *a.shape[1:])[:, 0], x))
        self._rows, self._key = micro_batch(batch), jax.random.key(setting.config.seed)
        self._params = partition.join(setting.frozen, setting.state.params)
        self._merging = _merging_layers(self._model.connector)
        names = [VIT, VISUAL, LLM, *(name for layer in self._merging for name in layer[:2])]
        run = self._on_mesh(lambda params, rows, key: recorded(lambda: self._task.losses(params, rows, key), names))
        self._calls = jax.jit(run)(self._params, self._rows, self._key)

    @property
    def prefix(self) -> int:
        """The number of soft prompt tokens of a picture."""
        return self._calls[VISUAL].result.prefix.shape[1]

    def measure(self, say: Callable[[str], None] = lambda message: None) -> dict[str, Cost]:
        """Returns the parts by name, in the order of the step; "merge" is contained in "connector".

        Args:
          say: is told what is measured next.
        """
        parts = {
            "ViT": self._vit,
            "connector": self._connector,
            "merge": self._merge,
            "LLM": self._llm,
            "head and loss": self._head_and_loss,
        }
        costs = {}
        for name, measure in parts.items():
            say(f"compiling and timing {name}")
            forward, total = (cost.times(self._times) for cost in measure())
            costs |= {name: total} if name != "LLM" else {"LLM forward": forward, "LLM backward": total - forward}
        say("compiling and timing the optimizer")
        return costs | {"optimizer": self._optimizer()}

    def _vit(self) -> Both:
        def run(params: dict, given: tuple, call: tuple) -> object:
            args, kwargs = call
            return self._model.vit.apply({"params": params["vit"]}, *args, **kwargs, method=VIT[1])

        return self._cost(run, ("vit",), (), self._calls[VIT][:2])

    def _connector(self) -> Both:
        def run(params: dict, given: tuple, fixed: tuple) -> object:
            images, key, *tokens = fixed
            with replacing({VIT: (*given, *tokens)[0]}):
                return self._model.apply({"params": params}, images, method=VISUAL[1], rngs={"dropout": key})

        tokens, passes = (self._calls[VIT].result,), bool(self._split(("vit",))[0])
        given, fixed = (tokens, ()) if passes else ((), tokens)
        return self._cost(run, VISUAL_PARAMS, given, (self._rows["image"], self._key, *fixed))

    def _merge(self) -> Both:
        def run(params: dict, tokens: list[jax.Array], keys: list[jax.Array]) -> list[jax.Array]:
            merged = []
            for x, key, (*_, r) in zip(tokens, keys, self._merging, strict=True):
                if removed := token_merging.mergeable(x.shape[1], r, class_token):
                    slots = token_merging.match(key.mean(2), removed, class_token)
                    merged.append(token_merging.merge(x, slots, x.shape[1] - removed))
            return merged

        class_token = self._model.vit.class_token

        keys, tokens = ([self._calls[layer[i]].result for layer in self._merging] for i in (0, 1))
        return self._cost(run, (), tokens, keys)

    def _llm(self) -> Both:
        def run(params: dict, call: tuple, key: jax.Array) -> object:
            args, kwargs = call
            return self._model.llm.apply({"params": params["llm"]}, *args, **kwargs, rngs={"dropout": key})

        return self._cost(run, ("llm",), self._calls[LLM][:2], self._key)

    def _head_and_loss(self) -> Both:
        def run(params: dict, results: dict[Name, object], fixed: tuple) -> object:
            with replacing(results):
                return self._task.losses(params, *fixed)

        results = {name: self._calls[name].result for name in (VISUAL, LLM)}
        others = [name for name in self._params if name not in ("vit", *VISUAL_PARAMS)]
        return self._cost(run, others, results, (self._rows, self._key))

    def _optimizer(self) -> Cost:
        config, state = self._setting.config, self._setting.state
        optimizer = make_optimizer(config.optimizer, config.train.steps, self._task.rule)

        def run(gradients: dict, opt_state: optax.OptState, params: dict) -> object:
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        return self._measured(run, state.params, state.opt_state, state.params)

    def _split(self, names: Collection[str]) -> tuple[dict, dict]:
        """Returns (the trained parameters of these modules, all others)."""
        return partition.split(self._params, lambda path: path[0] in names and self._task.is_trained(path))

    def _cost(self, run: Callable, names: Collection[str], given: object, fixed: object) -> Both:
        """Measures run(params, given, fixed).

        Args:
          names: the modules whose trained parameters get gradients.
          given: arrays, of which those of floats get gradients.
          fixed: other arrays.
        """
        passes = make_passes(run, *self._split(names), given, fixed)
        cost = self._measured(passes.forward, *passes.arguments)
        return Both(cost, self._measured(passes.both, *passes.arguments) if passes.differentiates else cost)

    def _measured(self, run: Callable, *arguments: object) -> Cost:
        traced = jax.jit(self._on_mesh(run)).trace(*arguments)
        return Cost(compiled_seconds(traced, arguments, self._repeats), count_flops(traced.jaxpr))

    def _on_mesh(self, run: Callable) -> Callable:
        def inside(*arguments: object) -> object:
            with meshes.activation_shardings(self._setting.mesh):
                return run(*arguments)

        return inside


def _merging_layers(connector: Connector) -> list[tuple[Name, Name, int]]:
    """Returns of each layer that merges: the calls that give keys and tokens, and how many tokens it may remove."""
    merging = [(i, r) for i, r in enumerate(connector.merges) if r]
    return [
        (*((f"connector/layer_{i}/{name}", "__call__") for name in ("key", "attention_norm")), r) for i, r in merging
    ]
