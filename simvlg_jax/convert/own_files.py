"""Our own weight files: one nested tree of arrays in one safetensors file, named by their paths."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from simvlg_jax.utils import files
from simvlg_jax.utils.errors import UserError


def write_tree(path: Path, tree: dict, dtype: np.dtype | None = None, metadata: dict[str, str] | None = None) -> None:
    """Writes host or device arrays, cast to `dtype` if given; the file appears whole or not at all."""
    flat = traverse_util.flatten_dict(tree, sep="/")
    write_arrays(path, {name: np.asarray(x).astype(dtype or x.dtype) for name, x in flat.items()}, metadata)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """One safetensors file of named arrays; it appears whole or not at all, and readable to all."""
    with files.atomic_write(path) as partial:
        # safetensors writes an array's memory as it lies, whatever its strides.
        save_file({name: np.asarray(x, order="C") for name, x in arrays.items()}, partial, metadata)
        partial.chmod(0o644)


def current_name(name: str) -> str:
    """Today's name of a parameter in a file that an older version wrote: vl_proj is in the connector now."""
    return f"connector/{name}" if name.startswith("vl_proj/") else name


def read_flat(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a safetensors file by name, bfloat16 included.

    Raises:
      UserError: absent, truncated or not a safetensors file.
    """
    try:
        with safe_open(path, "np") as file:
            return {current_name(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
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
