"""Counts the FLOPs of a function from its jaxpr.

XLA's own cost analysis counts the body of a scan once, whatever its length. Here it counts `length` times.
"""

from math import prod

import jax


def count_flops(closed: "jax.extend.core.ClosedJaxpr") -> int:
    """Returns the FLOPs of all matrix products in a jaxpr: two per multiply-add. Elementwise work is not counted.

    They are those of all devices. Of branches, the one with the most work counts.
    """
    total = 0
    for eqn in closed.jaxpr.eqns if hasattr(closed, "jaxpr") else closed.eqns:
        if eqn.primitive.name == "dot_general":
            (lhs_contract, _), _ = eqn.params["dimension_numbers"]
            contracted = prod(eqn.invars[0].aval.shape[axis] for axis in lhs_contract)
            total += 2 * prod(eqn.outvars[0].aval.shape) * contracted
        inner = [count_flops(value) for value in _jaxprs(eqn.params)]
        runs = _RUNS.get(eqn.primitive.name, lambda params: 1)(eqn.params)
        total += runs * (max(inner) if eqn.primitive.name == "cond" else sum(inner))
    return total


# Primitive -> how often it runs the jaxpr that it holds.
_RUNS = {
    "scan": lambda params: params["length"],
    "shard_map": lambda params: params["mesh"].size,
    "pallas_call": lambda params: prod(params["grid_mapping"].grid),
}


def _jaxprs(params: dict):
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns"):
                yield item
