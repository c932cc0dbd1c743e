"""The place of each element of an array as a number: what dropout hashes, and what weighs the bits of a fingerprint."""

import jax
import jax.numpy as jnp


def element_numbers(
    shape: tuple[int, ...], whole: tuple[int, ...] | None = None, start: tuple[jax.Array, ...] | None = None
) -> jax.Array:
    """Returns uint32 of a shape: 0, 1, 2, ... in the order of memory, modulo 2^32; each is made where it is needed.

    Args:
      whole, start: the numbers are those of an array of shape `whole`, in its part from the place `start` on.
    """
    numbers, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        places = jax.lax.broadcasted_iota(jnp.uint32, shape, axis) + (start[axis] if start else 0)
        numbers = numbers + places * jnp.uint32(stride % 2**32)
        stride *= (whole or shape)[axis]
    return numbers
