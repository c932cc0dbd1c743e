"""Frozen weights are not saved with a run: it is held to the same ones by name and fingerprint."""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from simvlg_jax import files
from simvlg_jax.errors import UserError
from simvlg_jax.models.layers import element_numbers
from simvlg_jax.parallel import processes


def check_frozen(workdir: Path, frozen: dict, sources: dict[str, str]) -> None:
    """Writes workdir/frozen.json (source and fingerprint of each frozen tree), or holds the trees against it.

    Raises:
      UserError: a run is resumed over other frozen weights than it was started with.
    """
    found = {name: {"source": sources[name], "fingerprint": fingerprint(tree)} for name, tree in frozen.items()}
    path = workdir / "frozen.json"
    if path.exists():
        known = json.loads(path.read_text())
        for name, entry in found.items():
            if known.get(name, {}).get("fingerprint") != entry["fingerprint"]:
                raise UserError(
                    f"the frozen {name} ({entry['source']}) is not the one this run was started with: "
                    f"restore the old weights, or start anew in another --workdir"
                )
    elif jax.process_index() == 0:
        files.write_json(path, found)
    processes.sync("frozen weights are known")


def fingerprint(tree: dict) -> str:
    """A number in hexadecimal that changes with any name, shape, dtype or bit of a tree of device arrays.

    Every array is reduced to two 32-bit sums where it lies, so nothing is gathered, and whatever the devices and
    processes that hold the tree, the number is the same. Not made against forgery.
    """
    flat = traverse_util.flatten_dict(tree, sep="/")
    sums = jax.jit(lambda flat: jax.tree.map(_bit_sums, flat))(flat)
    total = hashlib.sha256()
    for name, array in sorted(flat.items()):
        total.update(f"{name} {array.dtype} {array.shape} {np.asarray(sums[name]).tolist()}\n".encode())
    return total.hexdigest()


def _bit_sums(array: jax.Array) -> jax.Array:
    """(2,) uint32: the array's bits weighted by two pseudo-random odd numbers of their place, modulo 2^32."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    place = element_numbers(array.shape)
    first = (place + 1) * jnp.uint32(2654435761)
    first = (first ^ (first >> 15)) * jnp.uint32(2246822519)
    second = (first ^ (first >> 13)) * jnp.uint32(3266489917)
    return jnp.stack([jnp.sum(bits * (weight | 1), dtype=jnp.uint32) for weight in (first, second)])
