"""The forward pass of a part of the model, and its forward and backward pass together."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from simvlg_jax.tasks import params as partition


class Passes(NamedTuple):
    """Two functions of the same `arguments`. `differentiates` says whether anything gets a gradient."""

    forward: Callable
    both: Callable
    arguments: tuple
    differentiates: bool


def make_passes(run: Callable, trained: dict, rest: dict, given: object, fixed: object) -> Passes:
    """Returns the passes of run(params, given, fixed) -> arrays.

    Args:
      trained: the parameters that get gradients.
      rest: the other parameters.
      given: a tree of arrays, of which those of floats get gradients.
      fixed: a tree of other arrays.
    """
    leaves, structure = jax.tree.flatten(given)
    floats = [i for i, leaf in enumerate(leaves) if _is_float(leaf)]
    moving, still = [leaves[i] for i in floats], {i: x for i, x in enumerate(leaves) if i not in floats}

    def forward(moved: tuple[dict, list], rest: dict, still: dict, fixed: object) -> list[jax.Array]:
        trained, values = moved
        every = still | dict(zip(floats, values, strict=True))
        arrays = jax.tree.unflatten(structure, [every[i] for i in range(len(every))])
        return list(filter(_is_float, jax.tree.leaves(run(partition.join(trained, rest), arrays, fixed))))

    def both(moved: tuple[dict, list], rest: dict, still: dict, fixed: object) -> tuple:
        results, pull_back = jax.vjp(lambda moved: forward(moved, rest, still, fixed), moved)
        return results, pull_back(results)  # the results serve as slopes; constants could be folded

    moved = (trained, moving)
    return Passes(forward, both, (moved, rest, still, fixed), bool(jax.tree.leaves(moved)))


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)
