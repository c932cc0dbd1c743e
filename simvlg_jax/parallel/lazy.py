"""Arrays that are read only when they are put on devices, so that a model larger than host memory can be loaded.

A `Lazy` has a shape and a dtype, and can be reshaped, transposed, sliced and cast before it is read. A `LazyStack` is
a stack of layers that is never whole in host memory: `put` fills it on the devices layer by layer.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike


class Shaped:
    """Properties that follow from the shape."""

    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def __len__(self) -> int:
        return self.shape[0]


class Lazy(Shaped):
    """A numpy array that is not read yet. `read` reads it, anew on each call."""

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike, read: Callable[[], np.ndarray]):
        self.shape, self.dtype, self.read = tuple(shape), np.dtype(dtype), read

    def apply(self, function: Callable[[np.ndarray], np.ndarray]) -> "Lazy":
        """Returns `function` of the array, still unread. The shape comes from a broadcast zero that takes no memory."""
        zeros = function(np.broadcast_to(np.zeros((), self.dtype), self.shape))
        return Lazy(zeros.shape, zeros.dtype, lambda: function(self.read()))

    @property
    def T(self) -> "Lazy":
        return self.apply(lambda x: x.T)

    def reshape(self, *shape: int) -> "Lazy":
        return self.apply(lambda x: x.reshape(*shape))

    def transpose(self, *axes: int) -> "Lazy":
        return self.apply(lambda x: x.transpose(*axes))

    def astype(self, dtype: DTypeLike) -> "Lazy":
        return Lazy(self.shape, dtype, lambda: self.read().astype(dtype))

    def __getitem__(self, index) -> "Lazy":
        return self.apply(lambda x: x[index])

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


class LazyStack(Shaped):
    """(L, ...): a stack of L arrays of one shape. Each may be `Lazy`."""

    def __init__(self, layers: Sequence):
        self.layers = list(layers)
        self.shape, self.dtype = (len(self.layers), *self.layers[0].shape), np.dtype(self.layers[0].dtype)

    def astype(self, dtype: DTypeLike) -> "LazyStack":
        return LazyStack([layer.astype(dtype) for layer in self.layers])

    def __getitem__(self, index: int):
        return self.layers[index]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(np.stack([np.asarray(layer) for layer in self.layers]), dtype)


def split(x, parts: int) -> list:
    """Splits any kind of array into equal parts along the first axis."""
    size = x.shape[0] // parts
    return [x[i * size : (i + 1) * size] for i in range(parts)]


def put(x, shardings, convert: Callable = np.asarray):
    """Puts any kind of array on its devices. Of a stack, only one layer at a time is in host memory.

    Every process reads the whole array and keeps the shards of its own devices.

    Args:
      shardings: a NamedSharding, or what `convert` returns with shardings for arrays.
      convert: what becomes of the host array, of a stack's layers one by one: an array, or a tree of arrays.
    """
    layers_whole = all((s.spec or (None,))[0] is None for s in jax.tree.leaves(shardings))
    if not isinstance(x, LazyStack) or not layers_whole:
        return jax.tree.map(_put_shards, convert(np.asarray(x)), shardings)
    stack = None
    for index, layer in enumerate(x.layers):
        arrays = convert(np.asarray(layer))
        writers = jax.tree.map(lambda a, s: _stack_writer((len(x), *a.shape), a.dtype, s), arrays, shardings)
        if stack is None:
            stack = jax.tree.map(lambda _, writer: writer.zeros(), arrays, writers)
        stack = jax.tree.map(lambda old, a, writer, i=index: writer.write(old, a, i), stack, arrays, writers)
        jax.block_until_ready(stack)  # otherwise the host would run ahead and hold several layers
    return stack


def _put_shards(x, sharding: NamedSharding) -> jax.Array:
    array = np.asarray(x)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


class _StackWriter:
    """Fills a stack of layers of one shape on its devices."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding):
        def write(stack: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(stack, layer, index, 0)

        self.zeros = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)
        self._write = jax.jit(write, donate_argnums=0, out_shardings=sharding)
        self._layer = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))

    def write(self, stack: jax.Array, layer: np.ndarray, index: int) -> jax.Array:
        return self._write(stack, _put_shards(layer, self._layer), index)


_stack_writer = functools.lru_cache(maxsize=64)(_StackWriter)
