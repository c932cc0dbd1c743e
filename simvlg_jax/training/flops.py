"""Counts the FLOPs of a function from its jaxpr.

XLA's own cost analysis counts the body of a scan once, whatever its length. Here it counts `length` times.
"""

from math import prod

import jax


def count_flops(closed: "jax.extend.core.ClosedJaxpr") -> int:
    """Returns the FLOPs of all matrix products in a jaxpr: two per multiply-add. Elementwise work is not counted."""
    total = 0
    for eqn in closed.jaxpr.eqns if hasattr(closed, "jaxpr") else closed.eqns:
        if eqn.primitive.name == "dot_general":
            (lhs_contract, _), _ = eqn.params["dimension_numbers"]
            contracted = prod(eqn.invars[0].aval.shape[axis] for axis in lhs_contract)
            total += 2 * prod(eqn.outvars[0].aval.shape) * contracted
        inner = sum(count_flops(value) for value in _jaxprs(eqn.params))
        total += inner * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
    return total


def _jaxprs(params: dict):
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns"):
                yield item
