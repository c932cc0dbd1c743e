"""Fingerprints of device arrays: numbers that change with any bit, made where the array lies."""

import concurrent.futures
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from simvlg_jax.parallel import collectives
from simvlg_jax.utils.hashing import element_numbers


def array_fingerprints(tree) -> dict[str, str]:
    """Path -> dtype, shape and two 32-bit sums over the bits, as text, for each array of a tree; sorted by path.

    Any changed bit changes the text. The number of devices and processes that hold the array does not. Every process
    sums up the shards that it holds, so only the sums travel. Not made against forgery.
    """
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}
    arrays = {name: x if isinstance(x, jax.Array) else jnp.asarray(x) for name, x in sorted(flat.items())}
    with concurrent.futures.ThreadPoolExecutor() as pool:  # each shape compiles, on each device
        started = list(pool.map(_shard_sums, arrays.values()))
    here = np.array([np.sum([np.zeros(2), *sums], 0, np.uint64) for sums in started]).reshape(-1, 2) % 2**32
    everywhere = collectives.gather_each(here.astype(np.uint32)).sum(0, np.uint64) % 2**32  # (arrays, 2)
    return {
        name: f"{array.dtype} {array.shape} {sums.tolist()}"
        for (name, array), sums in zip(arrays.items(), everywhere, strict=True)
    }


def fingerprint(tree) -> str:
    """A hexadecimal number for a whole tree, which changes with its names too."""
    lines = "".join(f"{name} {value}\n" for name, value in array_fingerprints(tree).items())
    return hashlib.sha256(lines.encode()).hexdigest()


def _shard_sums(array: jax.Array) -> list[jax.Array]:
    """(2,) uint32 for each shard that is here; of shards that several devices hold, one counts."""
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    starts = [tuple(np.uint32(cut.start or 0) for cut in shard.index) for shard in shards]
    return [_bit_sums(shard.data, start, array.shape) for shard, start in zip(shards, starts, strict=True)]


@functools.partial(jax.jit, static_argnums=2)
def _bit_sums(shard: jax.Array, start: tuple[jax.Array, ...], shape: tuple[int, ...]) -> jax.Array:
    """(2,) uint32: bits weighted by two pseudo-random odd numbers of their place, modulo 2^32.

    Args:
      shard: a part of an array of the `shape`, from `start` on.
    """
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[shard.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(shard, unsigned).astype(jnp.uint32)
    place = element_numbers(shard.shape, shape, start)
    first = (place + 1) * jnp.uint32(2654435761)
    first = (first ^ (first >> 15)) * jnp.uint32(2246822519)
    second = (first ^ (first >> 13)) * jnp.uint32(3266489917)
    return jnp.stack([jnp.sum(bits * (weight | 1), dtype=jnp.uint32) for weight in (first, second)])
