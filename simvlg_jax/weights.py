"""Our own weight files: one nested tree of arrays in one safetensors file, named by their paths."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from simvlg_jax.errors import UserError


def write_tree(path: Path, tree: dict, dtype: np.dtype | None = None, metadata: dict[str, str] | None = None) -> None:
    """Writes host or device arrays, cast to `dtype` if given; the file appears whole or not at all."""
    flat = traverse_util.flatten_dict(tree, sep="/")
    write_arrays(path, {name: np.asarray(x).astype(dtype or x.dtype) for name, x in flat.items()}, metadata)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """One safetensors file of named arrays; it appears whole or not at all, and readable to all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    # safetensors writes an array's memory as it lies, whatever its strides.
    save_file({name: np.asarray(x, order="C") for name, x in arrays.items()}, partial, metadata)
    partial.chmod(0o644)
    partial.rename(path)


def read_flat(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a safetensors file by name, bfloat16 included.

    Raises:
      UserError: absent, truncated or not a safetensors file.
    """
    try:
        with safe_open(path, "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(
            f"no weights at {path}: train them first (configs/openmoji.py says how), or correct the config"
        ) from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read weights from {path}: {error}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """What `write_tree` was given as metadata."""
    with safe_open(path, "np") as file:
        return file.metadata() or {}


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
    place, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(array.ndim)):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    first = (place + 1) * jnp.uint32(2654435761)
    first = (first ^ (first >> 15)) * jnp.uint32(2246822519)
    second = (first ^ (first >> 13)) * jnp.uint32(3266489917)
    return jnp.stack([jnp.sum(bits * (weight | 1), dtype=jnp.uint32) for weight in (first, second)])
