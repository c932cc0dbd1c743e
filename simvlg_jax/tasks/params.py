"""How each parameter is trained: rules by name, and the tree cut in two by them."""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from flax import traverse_util

from simvlg_jax.utils.errors import UserError

# Biases, LayerNorm scales and the two scalars are not decayed. The published code goes by the number of dimensions,
# which decays the scalars.
NOT_DECAYED = "bias|scale|temperature|log_temperature|alpha"
DECAYED = "kernel|latents|query_tokens|position|token_type|temporal_position|cls|word|embedding|lm_head"
TEMPORAL = {"temporal_merge", "temporal_position"}  # parts of a frozen ViT that video trains
OF_VIDEO = {*TEMPORAL, "frame_embedding", "frame_weight"}  # what an image model lacks


class Rule(NamedTuple):
    """How the parameters whose whole path ("connector/layer_0/query/kernel") matches a pattern are trained.

    Attributes:
      pattern: a regular expression.
      trained: else frozen.
      decay: whether AdamW's weight decay applies.
      lr: factor on the learning rate.
    """

    pattern: str
    trained: bool
    decay: bool = False
    lr: float = 1.0


def frozen(pattern: str) -> list[Rule]:
    """The rule of frozen parameters."""
    return [Rule(pattern, trained=False)]


def trained(module: str, lr: float = 1.0) -> list[Rule]:
    """The rules of a trained module, or of a single parameter: which leaves are decayed follows from their names.

    Args:
      module: a regular expression of the path above the leaves.
    """
    return [
        Rule(f"{module}/(.*/)?({DECAYED})", trained=True, decay=True, lr=lr),
        Rule(f"{module}/(.*/)?({NOT_DECAYED})", trained=True, lr=lr),
    ]


@functools.lru_cache(maxsize=100_000)
def find_rule(rules: Sequence[Rule], path: tuple[str, ...]) -> Rule:
    """The one rule that matches a path. Raises UserError if there are several or none, see `check_rules`."""
    check_rules(rules, [path])
    return next(_matching(rules, path))


def check_rules(rules: Sequence[Rule], paths: Iterable[tuple[str, ...]]) -> None:
    """Raises UserError with the parameters that no rule matches, and those that several match."""
    found = {"/".join(path): [rule.pattern for rule in _matching(rules, path)] for path in paths}
    none = [path for path, patterns in found.items() if not patterns]
    several = [f"{path} ({', '.join(patterns)})" for path, patterns in found.items() if len(patterns) > 1]
    if none or several:
        raise UserError(
            "each parameter needs exactly one rule (tasks/params.py).\n"
            f"  no rule matches ({len(none)}): {', '.join(none) or 'none'}\n"
            f"  several rules match ({len(several)}): {', '.join(several) or 'none'}"
        )


def _matching(rules: Sequence[Rule], path: tuple[str, ...]) -> Iterable[Rule]:
    return (rule for rule in rules if re.fullmatch(rule.pattern, "/".join(path)))


def split(tree: dict, is_trained: Callable[[tuple[str, ...]], bool]) -> tuple[dict, dict]:
    """(trained, frozen): two trees that together hold every leaf of `tree` once."""
    flat = traverse_util.flatten_dict(tree)
    trained = {path: x for path, x in flat.items() if is_trained(path)}
    frozen = {path: x for path, x in flat.items() if path not in trained}
    return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(frozen)


def join(first: dict, second: dict) -> dict:
    """One tree of two that share no leaf, though they may share branches."""
    return traverse_util.unflatten_dict({**traverse_util.flatten_dict(first), **traverse_util.flatten_dict(second)})
