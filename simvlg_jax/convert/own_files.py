"""Our own weight files: a nested tree of arrays in one safetensors file, each array named by its path."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from simvlg_jax.utils import files
from simvlg_jax.utils.errors import UserError


def write_tree(path: Path, tree: dict, dtype: np.dtype | None = None, metadata: dict[str, str] | None = None) -> None:
    """Writes host or device arrays, cast to `dtype` if it is given. The file appears whole or not at all."""
    flat = traverse_util.flatten_dict(tree, sep="/")
    write_arrays(path, {name: np.asarray(x).astype(dtype or x.dtype) for name, x in flat.items()}, metadata)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Writes named arrays as one safetensors file. It appears whole or not at all, and every user can read it."""
    with files.atomic_write(path) as partial:
        # safetensors writes the memory of an array and ignores its strides.
        save_file({name: np.asarray(x, order="C") for name, x in arrays.items()}, partial, metadata)
        partial.chmod(0o644)


def current_name(name: str) -> str:
    """Returns the current name of a parameter. In files of older versions, vl_proj is not in the connector."""
    return f"connector/{name}" if name.startswith("vl_proj/") else name


def own_tree(tensors: Mapping[str, np.ndarray], part: str = "") -> dict | None:
    """Returns the nested tree of a file of `write_tree`; None for other files, whose names have no "/".

    Args:
      part: such as "vit", whose tree is returned. The file is of this part alone, or of a whole model.
    """
    if not any("/" in name for name in tensors):
        return None
    if part and not any(name.startswith(f"{part}/") for name in tensors):
        return traverse_util.unflatten_dict(dict(tensors), sep="/")
    tree = traverse_util.unflatten_dict({current_name(name): tensors[name] for name in tensors}, sep="/")
    return tree[part] if part else tree


def read_flat(path: Path) -> dict[str, np.ndarray]:
    """Returns all arrays of a safetensors file by name, also those in bfloat16.

    Raises:
      UserError: the file is missing, truncated or not a safetensors file.
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
    """Returns the metadata that `write_tree` was given."""
    with safe_open(path, "np") as file:
        return file.metadata() or {}
