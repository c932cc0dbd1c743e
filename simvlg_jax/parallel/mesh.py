"""The device mesh, and where every array lives on it."""

from collections.abc import Iterable

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from simvlg_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Logical axis of a parameter or activation -> mesh axes. What is not listed is not split.
RULES = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("layers", None),
    ("head_dim", None),
    ("norm", None),
    ("patch", None),
)


def make_mesh(sizes: ConfigDict, devices: Iterable[jax.Device] | None = None) -> Mesh:
    """A mesh of axes data, fsdp, tensor; one size may be -1 and takes the devices left over.

    Raises:
      UserError (status 2): the product does not fit the devices there are.
    """
    devices = list(devices or jax.devices())
    shape = [sizes[axis] for axis in AXES]
    asked = dict(zip(AXES, shape, strict=True))
    if any(n == 0 or n < -1 for n in shape) or shape.count(-1) > 1:
        raise UserError(f"mesh sizes must be positive, at most one -1: got {asked}", 2)
    known = int(np.prod([n for n in shape if n > 0]))
    if -1 in shape:
        shape[shape.index(-1)] = max(1, len(devices) // known)
    total = int(np.prod(shape))
    if total > len(devices):
        raise UserError(
            f"the mesh {asked} needs {total} devices and {len(devices)} are here ({devices[0].platform}): "
            "set --config.mesh.* smaller, or on a CPU force more with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={total}",
            2,
        )
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:total])


def param_shardings(boxed, mesh: Mesh):
    """NamedShardings for a tree of `jax.eval_shape(model.init)` (boxed with logical axis names), unboxed.

    A dimension that its mesh axes do not divide stays whole.
    """
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), RULES)
    shapes = nn.unbox(boxed)

    def fit(array: jax.ShapeDtypeStruct, spec: PartitionSpec) -> NamedSharding:
        padded = tuple(spec) + (None,) * (array.ndim - len(spec))
        kept = [
            axis if size % _axis_size(mesh, axis) == 0 else None for size, axis in zip(array.shape, padded, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*kept))

    return jax.tree.map(fit, shapes, specs)


def _axis_size(mesh: Mesh, axis: str | tuple[str, ...] | None) -> int:
    names = (axis,) if isinstance(axis, str) else axis or ()
    return int(np.prod([mesh.shape[name] for name in names]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """How many ways the batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's part of a batch onto the devices, as global arrays split along the leading axis."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}
