"""Fingerprints of device arrays: numbers that change with any bit, made where the array lies."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from simvlg_jax.models.layers import element_numbers


def array_fingerprints(tree) -> dict[str, str]:
    """Path -> dtype, shape and two 32-bit sums over the bits, as text, for each array of a tree; sorted by path.

    Any changed bit changes the text. The number of devices and processes that hold the array does not. The sums are
    made where the array lies, so nothing is gathered. Not made against forgery.
    """
    arrays = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}
    sums = {name: _bit_sums(array) for name, array in sorted(arrays.items())}  # all are started before one is awaited
    return {name: f"{arrays[name].dtype} {arrays[name].shape} {np.asarray(x).tolist()}" for name, x in sums.items()}


def fingerprint(tree) -> str:
    """A hexadecimal number for a whole tree, which changes with its names too."""
    lines = "".join(f"{name} {value}\n" for name, value in array_fingerprints(tree).items())
    return hashlib.sha256(lines.encode()).hexdigest()


@jax.jit
def _bit_sums(array: jax.Array) -> jax.Array:
    """(2,) uint32: the array's bits weighted by two pseudo-random odd numbers of their place, modulo 2^32."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    place = element_numbers(array.shape)
    first = (place + 1) * jnp.uint32(2654435761)
    first = (first ^ (first >> 15)) * jnp.uint32(2246822519)
    second = (first ^ (first >> 13)) * jnp.uint32(3266489917)
    return jnp.stack([jnp.sum(bits * (weight | 1), dtype=jnp.uint32) for weight in (first, second)])
