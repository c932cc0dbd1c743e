"""Checkpoints of older versions, in which vl_proj stands beside the connector instead of in it."""

from typing import Any

import jax

NAME, NEW_PARENT = "vl_proj", "connector"


def to_former(tree: Any) -> Any:
    """Returns a TrainState or parameters with vl_proj where older versions had it."""
    return _map_dicts(_out, tree)


def to_current(tree: Any) -> Any:
    """Returns the inverse of `to_former`."""
    return _map_dicts(_in, tree)


def _map_dicts(move, tree: Any) -> Any:
    return jax.tree.map(lambda x: move(x) if isinstance(x, dict) else x, tree, is_leaf=lambda x: isinstance(x, dict))


def _out(params: dict) -> dict:
    connector = dict(params[NEW_PARENT])
    return {**params, NAME: connector.pop(NAME), NEW_PARENT: connector}


def _in(params: dict) -> dict:
    rest = {name: x for name, x in params.items() if name != NAME}
    return {**rest, NEW_PARENT: {**params[NEW_PARENT], NAME: params[NAME]}}
