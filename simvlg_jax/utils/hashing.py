"""The index of each array element as a number. Dropout hashes it, and fingerprints use it as a weight."""

import jax
import jax.numpy as jnp


def element_numbers(
    shape: tuple[int, ...], whole: tuple[int, ...] | None = None, start: tuple[jax.Array, ...] | None = None
) -> jax.Array:
    """Returns uint32 of `shape`: row-major indices 0, 1, 2, ... modulo 2^32. Each device computes only its own part.

    Args:
      whole, start: if given, the result is the block of shape `shape` that begins at index `start` of the indices of
        an array of shape `whole`.
    """
    numbers, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis) + (start[axis] if start else 0)
        numbers = numbers + index * jnp.uint32(stride % 2**32)
        stride *= (whole or shape)[axis]
    return numbers
