"""The calls of a model's modules during one forward pass: recorded with their arrays, and replaced by what they gave.

So a part of the training step runs on its own over the arrays that it gets within the step, whatever their layout is.
A call is named by the path of its module and the method: ("llm", "__call__"); the path of the whole model is "".
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import flax.linen as nn

Name = tuple[str, str]


class Call(NamedTuple):
    """Arguments and result of a call."""

    args: tuple
    kwargs: dict
    result: Any


def recorded(run: Callable[[], object], names: Collection[Name]) -> dict[Name, Call]:
    """Returns the named calls that `run` makes. Traceable."""
    seen: dict[Name, Call] = {}

    def watch(method: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> object:
        result = method(*args, **kwargs)
        if (name := _name(context)) in names:
            seen[name] = Call(args, kwargs, result)
        return result

    with nn.intercept_methods(watch):
        run()
    return seen


def replacing(results: Mapping[Name, object]):
    """Returns a context in which the named calls do no work and give these results."""

    def replace(method: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> object:
        name = _name(context)
        return results[name] if name in results else method(*args, **kwargs)

    return nn.intercept_methods(replace)


def _name(context: nn.module.InterceptorContext) -> Name:
    return "/".join(context.module.path), context.method_name
