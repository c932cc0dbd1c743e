"""The device mesh and the sharding of every array."""

import contextlib
from collections.abc import Callable, Iterable

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from simvlg_jax.utils.errors import UserError

AXES = ("data", "fsdp", "tensor")

# (data, fsdp, tensor) within a slice; -1: all remaining devices.
PRESETS = {
    "replicated": (-1, 1, 1),
    "fsdp": (1, -1, 1),
    "fsdp+tensor": (1, -1, 2),
}

# Logical axis of a parameter or activation -> mesh axes. Axes that are not listed are not sharded.
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


def mesh_shape(sizes: ConfigDict) -> tuple[int, ...]:
    """Returns (data, fsdp, tensor) of a config, from its preset or its sizes.

    Raises:
      UserError (status 2): an unknown preset, a preset together with sizes, or invalid sizes.
    """
    shape = tuple(sizes[axis] for axis in AXES)
    if sizes.preset:
        if sizes.preset not in PRESETS:
            raise UserError(f"mesh.preset is {sizes.preset!r}; it takes {', '.join(map(repr, PRESETS))}", 2)
        if shape != PRESETS["replicated"]:
            raise UserError(
                f"mesh.preset={sizes.preset} sets all sizes, but {dict(zip(AXES, shape, strict=True))} is set too: "
                "leave one out (--config.mesh.preset= or --config.mesh.data=-1 --config.mesh.fsdp=1 "
                "--config.mesh.tensor=1)",
                2,
            )
        return PRESETS[sizes.preset]
    if any(n == 0 or n < -1 for n in shape) or shape.count(-1) > 1:
        raise UserError(f"mesh sizes must be positive, at most one -1: got {dict(zip(AXES, shape, strict=True))}", 2)
    return shape


def make_mesh(sizes: ConfigDict, devices: Iterable[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with axes data, fsdp and tensor. One size may be -1, which takes all remaining devices.

    The sizes are those of one TPU slice. With several slices, `data` is multiplied by their number, so only gradients
    travel over the slower network between slices.

    Args:
      devices: devices that must all be used. By default all devices of the run; a single process may then leave some
        of them unused.

    Raises:
      UserError (status 2): the product of the sizes does not match the number of devices.
    """
    whole = devices is not None or jax.process_count() > 1
    devices = list(devices or jax.devices())
    slices = num_slices(devices)
    whole |= slices > 1
    shape = list(mesh_shape(sizes))
    asked, here = dict(zip(AXES, shape, strict=True)), len(devices) // slices
    known = int(np.prod([n for n in shape if n > 0]))
    if -1 in shape:
        shape[shape.index(-1)] = max(1, here // known)
    total = int(np.prod(shape))
    if total < here and whole:
        raise UserError(f"the mesh {asked} leaves out some of {here} devices: make one of its sizes -1", 2)
    if total > here:
        raise UserError(
            f"the mesh {asked} needs {total} devices and {here} are here ({devices[0].platform}): "
            "set --config.mesh.* to fit, or force more CPU devices with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={total}",
            2,
        )
    # `jax.make_mesh` would refuse an axis that is shorter than a side of the slice, such as tensor=2 on v6e:4x4.
    options = {"allow_split_physical_axes": True}
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices[:total], **options)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(shape, (slices, 1, 1), devices, **options)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def num_slices(devices: Iterable[jax.Device]) -> int:
    """Returns the number of TPU slices that the devices belong to; 1 on other hardware."""
    return len({getattr(device, "slice_index", 0) if device.platform == "tpu" else 0 for device in devices})


def param_shardings(boxed, mesh: Mesh, is_split: Callable[[tuple[str, ...]], bool] = lambda path: True):
    """Returns the NamedSharding of each parameter, as an unboxed tree.

    A dimension that its mesh axes do not divide is not sharded.

    Args:
      boxed: the tree of `jax.eval_shape(model.init)`, boxed with logical axis names.
      is_split: returns whether the parameter at a path is sharded; if not, it is replicated.
    """
    specs = traverse_util.flatten_dict(nn.logical_to_mesh(nn.get_partition_spec(boxed), RULES))
    shapes = traverse_util.flatten_dict(nn.unbox(boxed))

    def fit(path: tuple[str, ...]) -> NamedSharding:
        shape, spec = shapes[path].shape, specs[path] if is_split(path) else ()
        padded = tuple(spec) + (None,) * (len(shape) - len(spec))
        kept = [axis if size % _axis_size(mesh, axis) == 0 else None for size, axis in zip(shape, padded, strict=True)]
        return NamedSharding(mesh, PartitionSpec(*kept))

    return traverse_util.unflatten_dict({path: fit(path) for path in shapes})


def _axis_size(mesh: Mesh, axis: str | tuple[str, ...] | None) -> int:
    names = (axis,) if isinstance(axis, str) else axis or ()
    return int(np.prod([mesh.shape[name] for name in names]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its leading axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of shards of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


@contextlib.contextmanager
def activation_shardings(mesh: Mesh):
    """A context in which `models.layers.split_batch` constrains the sharding of activations.

    Without the constraint, the compiler may gather activations of all devices where gathering the weights of a layer is
    far cheaper.
    """
    with nn.logical_axis_rules(RULES), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def _own_blocks(mesh: Mesh) -> list[int]:
    """Returns which of the `batch_shards` equal blocks of a batch the devices of this process hold.

    The blocks need not be adjacent: on a TPU slice the mesh follows the links between chips, so the blocks of different
    hosts may alternate. Processes whose devices differ only along `tensor` hold the same blocks.
    """
    blocks = mesh.devices.reshape(batch_shards(mesh), -1)
    here = jax.process_index()
    return [number for number, devices in enumerate(blocks) if any(d.process_index == here for d in devices)]


def local_rows(mesh: Mesh, batch_size: int) -> tuple[int, ...]:
    """Returns the rows of a global batch that this process reads, in the order that `put_batch` expects.

    Args:
      batch_size: the global batch size, a multiple of `batch_shards`.
    """
    size = batch_size // batch_shards(mesh)
    return tuple(block * size + row for block in _own_blocks(mesh) for row in range(size))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch, (rows, ...) each, on its devices.

    Returns:
      Global arrays (batch, ...), sharded by rows.
    """
    sharding, own = batch_sharding(mesh), _own_blocks(mesh)

    def put(local: np.ndarray) -> jax.Array:
        size = len(local) // len(own)
        starts = {block * size: index * size for index, block in enumerate(own)}  # in the global batch -> in `local`

        def block_at(index: tuple[slice, ...]) -> np.ndarray:
            start = starts[index[0].start or 0]
            return local[start : start + size]

        shape = (size * batch_shards(mesh), *local.shape[1:])
        return jax.make_array_from_callback(shape, sharding, block_at)

    return {name: put(value) for name, value in batch.items()}
