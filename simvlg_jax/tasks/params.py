"""Trained and frozen parameters: one tree cut in two by path, and put together again."""

from collections.abc import Callable, Collection

from flax import traverse_util

TEMPORAL = {"temporal_merge", "temporal_position"}  # parts of a frozen ViT that video trains


def is_trained(path: tuple[str, ...], frozen: Collection[str]) -> bool:
    """Whether SimVLG trains the parameter at a path, given the names of its frozen modules."""
    return path[0] not in frozen or not TEMPORAL.isdisjoint(path)


def split(tree: dict, is_trained: Callable[[tuple[str, ...]], bool]) -> tuple[dict, dict]:
    """(trained, frozen): two trees that together hold every leaf of `tree` once."""
    flat = traverse_util.flatten_dict(tree)
    trained = {path: x for path, x in flat.items() if is_trained(path)}
    frozen = {path: x for path, x in flat.items() if path not in trained}
    return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(frozen)


def join(first: dict, second: dict) -> dict:
    """One tree of two that share no leaf, though they may share branches."""
    return traverse_util.unflatten_dict({**traverse_util.flatten_dict(first), **traverse_util.flatten_dict(second)})
