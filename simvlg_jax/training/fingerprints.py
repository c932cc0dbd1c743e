"""Fingerprints of device arrays: checksums that change with any bit, computed on the devices that hold the arrays."""

import concurrent.futures
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from simvlg_jax.parallel import collectives
from simvlg_jax.utils.hashing import element_numbers


def array_fingerprints(tree) -> dict[str, str]:
    """Returns {path: dtype, shape and two 32-bit sums over the bits, as text} for the arrays of a tree, sorted by path.

    Any changed bit changes the text. The number of devices and processes that hold the array does not. Every process
    sums its own shards, so only the sums are exchanged. The sums do not protect against forgery.
    """
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}
    arrays = {name: x if isinstance(x, jax.Array) else jnp.asarray(x) for name, x in sorted(flat.items())}
    with concurrent.futures.ThreadPoolExecutor() as pool:  # in parallel, as each shape compiles on each device
        shard_sums = list(pool.map(_shard_sums, arrays.values()))
    local = np.array([np.sum([np.zeros(2), *sums], 0, np.uint64) for sums in shard_sums]).reshape(-1, 2) % 2**32
    total = collectives.gather_each(local.astype(np.uint32)).sum(0, np.uint64) % 2**32  # (arrays, 2)
    return {
        name: f"{array.dtype} {array.shape} {sums.tolist()}"
        for (name, array), sums in zip(arrays.items(), total, strict=True)
    }


def fingerprint(tree) -> str:
    """Returns a SHA-256 in hexadecimal for a tree. It covers the arrays and their names."""
    lines = "".join(f"{name} {value}\n" for name, value in array_fingerprints(tree).items())
    return hashlib.sha256(lines.encode()).hexdigest()


def _shard_sums(array: jax.Array) -> list[jax.Array]:
    """Returns (2,) uint32 for each shard on this process's devices. Of replicated shards, only one is counted."""
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    starts = [tuple(np.uint32(cut.start or 0) for cut in shard.index) for shard in shards]
    return [_bit_sums(shard.data, start, array.shape) for shard, start in zip(shards, starts, strict=True)]


@functools.partial(jax.jit, static_argnums=2)
def _bit_sums(shard: jax.Array, start: tuple[jax.Array, ...], shape: tuple[int, ...]) -> jax.Array:
    """Returns (2,) uint32: the sums of the elements' bits, weighted by two pseudo-random odd numbers, modulo 2^32.

    The weights depend on the index of each element in the global array.

    Args:
      shard: the block of the global array that begins at index `start`.
      shape: of the global array.
    """
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[shard.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(shard, unsigned).astype(jnp.uint32)
    index = element_numbers(shard.shape, shape, start)
    first = (index + 1) * jnp.uint32(2654435761)
    first = (first ^ (first >> 15)) * jnp.uint32(2246822519)
    second = (first ^ (first >> 13)) * jnp.uint32(3266489917)
    return jnp.stack([jnp.sum(bits * (weight | 1), dtype=jnp.uint32) for weight in (first, second)])
