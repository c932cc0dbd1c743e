"""Lazy arrays have numpy's values, know their shapes without reading, and are read one layer at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from simvlg_jax.convert import stacking
from simvlg_jax.parallel import mesh as meshes
from simvlg_jax.parallel.lazy import Lazy, LazyStack, put, split


class Counted:
    """A lazy array (6, 4) that counts how often it is read."""

    def __init__(self, offset: int = 0):
        self.array, self.reads = np.arange(24, dtype=np.float32).reshape(6, 4) + offset, 0

    def read(self) -> np.ndarray:
        self.reads += 1
        return self.array

    @property
    def lazy(self) -> Lazy:
        return Lazy((6, 4), np.float32, self.read)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.T,
        lambda x: x.reshape(2, -1, 4),
        lambda x: x.reshape(2, 3, 4).transpose(2, 0, 1),
        lambda x: x.T.reshape(4, 3, 2)[1:],
        lambda x: split(x, 3)[1].astype(np.float16),
    ],
)
def test_shape_is_known_before_reading_and_values_are_numpys(function):
    counted = Counted()
    lazy, wanted = function(counted.lazy), function(counted.array)
    assert (lazy.shape, lazy.dtype, lazy.ndim, lazy.size, len(lazy)) == (
        *(wanted.shape, wanted.dtype, wanted.ndim, wanted.size),
        len(wanted),
    )
    assert counted.reads == 0
    np.testing.assert_array_equal(lazy, wanted)
    assert counted.reads == 1


def test_stacked_layers_are_read_one_after_another_into_their_shards(monkeypatch):
    layers = [Counted(100 * i) for i in range(3)]
    tree = stacking.stack_layers({f"blocks_{i}": {"kernel": layer.lazy} for i, layer in enumerate(layers)})
    stack = tree["blocks"]["kernel"].astype(jnp.bfloat16)
    assert isinstance(stack, LazyStack) and stack.shape == (3, 6, 4)
    assert stacking.unstack_layers(tree)["blocks_1"]["kernel"] is tree["blocks"]["kernel"].layers[1]
    mesh = meshes.make_mesh(ConfigDict(dict(preset="", data=2, fsdp=2, tensor=2)))
    read_before_put = []
    make_array = jax.make_array_from_callback
    monkeypatch.setattr(
        jax,
        "make_array_from_callback",
        lambda *a: (read_before_put.append([c.reads for c in layers]), make_array(*a))[1],
    )
    placed = put(stack, NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor")))
    assert read_before_put == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert placed.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert placed.addressable_shards[0].data.shape == (3, 3, 2)
    np.testing.assert_array_equal(placed, np.stack([c.array for c in layers]).astype(jnp.bfloat16))


def test_plain_arrays_and_split_stacks_are_put_whole():
    mesh = meshes.make_mesh(ConfigDict(dict(preset="", data=1, fsdp=2, tensor=1)))
    whole = NamedSharding(mesh, PartitionSpec("fsdp"))
    array = np.arange(8.0, dtype=np.float32).reshape(4, 2)
    np.testing.assert_array_equal(put(array, whole), array)
    stack = LazyStack([Counted().lazy, Counted(5).lazy])
    np.testing.assert_array_equal(put(stack, whole), np.asarray(stack))
