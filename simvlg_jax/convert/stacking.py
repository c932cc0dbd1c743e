"""Converts between scanned parameters (one block, layers stacked on axis 0) and unrolled ones (a block per layer)."""

import jax
import numpy as np

from simvlg_jax.parallel.lazy import Lazy, LazyStack


def stack_layers(params: dict, name: str = "blocks") -> dict:
    """Replaces "NAME_0", "NAME_1", ... by one "NAME", whose host or lazy arrays have a leading layer axis."""
    depth = sum(key.startswith(f"{name}_") for key in params)
    layers = [params[f"{name}_{i}"] for i in range(depth)]
    rest = {key: value for key, value in params.items() if not key.startswith(f"{name}_")}
    return {**rest, name: jax.tree.map(_stack, *layers)}


def stack_all(params: dict) -> dict:
    """Stacks the layers of every top-level module that has a block per layer."""
    return {name: stack_layers(module) if "blocks_0" in module else module for name, module in params.items()}


def _stack(*arrays: np.ndarray | Lazy) -> np.ndarray | LazyStack:
    return LazyStack(arrays) if isinstance(arrays[0], Lazy) else np.stack(arrays)


def unstack_layers(params: dict, name: str = "blocks") -> dict:
    """The inverse of `stack_layers`."""
    depth = jax.tree.leaves(params[name])[0].shape[0]
    layers = {f"{name}_{i}": jax.tree.map(lambda array, i=i: array[i], params[name]) for i in range(depth)}
    return {**{key: value for key, value in params.items() if key != name}, **layers}
