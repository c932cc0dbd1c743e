"""int8 weights: a matrix as int8 values with one float32 scale for each output channel, and products with it.

They are for frozen weights: a product passes gradients to its input, and none to the matrix.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import struct
from jax.typing import DTypeLike

INT8 = np.dtype(np.int8)
STEPS = 127  # of the largest magnitude that shares a scale
# qwix makes 127.5 steps of it. The largest value is then between two steps, and rounding errors choose one of them.
CALIBRATION = f"absmax,{127.5 / STEPS}"


@struct.dataclass
class Int8(qwix.QArray):
    """A matrix, qvalue * scale: a pytree, so it is scanned, sharded and jitted like the array that it stands for.

    Attributes:
      qvalue: int8, of the matrix's shape.
      scale: float32, of the same shape but with 1 for every axis that a product sums over.
      int8_compute: whether products are computed in int8 too, see `product`.
      shards: with tensor parallelism, how many devices each hold a part of the axes that a product sums over, and how
        many a part of the other axes, which the backward pass sums over.
    """

    int8_compute: bool = struct.field(pytree_node=False, default=False)
    shards: tuple[int, int] = struct.field(pytree_node=False, default=(1, 1))

    @classmethod
    def of(cls, qvalue, scale, int8_compute: bool, shards: tuple[int, int] = (1, 1)) -> "Int8":
        """Returns one from any pair of leaves: arrays, their shapes or their shardings."""
        return cls(qvalue, scale, qtype=INT8, int8_compute=int8_compute, shards=shards)

    def like(self, qvalue, scale) -> "Int8":
        """Returns one with other leaves."""
        return Int8.of(qvalue, scale, self.int8_compute, self.shards)

    @property
    def summed(self) -> tuple[int, ...]:
        """The axes that share a scale, counted from the end."""
        sizes = zip(self.scale.shape, self.qvalue.shape, strict=True)
        return tuple(axis - self.ndim for axis, (scales, size) in enumerate(sizes) if scales < size)


def scale_shape(shape: tuple[int, ...], summed: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of the scales of a matrix. `summed` are axes that a product sums over, counted from the end."""
    return tuple(1 if axis - len(shape) in summed else size for axis, size in enumerate(shape))


def quantize(matrix: jax.Array, wanted: Int8) -> Int8:
    """Returns a matrix as int8. It can be traced.

    Args:
      wanted: one whose leaves have the shapes of the result's.
    """
    channels = [axis for axis in range(matrix.ndim) if axis - matrix.ndim not in wanted.summed]
    found = _quantize(matrix, channels)
    return wanted.like(found.qvalue, found.scale)


def quantize_on_host(matrix: np.ndarray, wanted: Int8) -> Int8:
    """Returns what `quantize` does as NumPy arrays; the scales may differ in their last bit.

    The bits are the same on any machine. Accelerators round divisions differently, and a run that resumes on other
    hardware would not recognise its frozen weights.

    Args:
      matrix: the whole one, or one layer of a stack.
      wanted: of the whole.
    """
    matrix, summed = np.asarray(matrix, np.float32), wanted.summed
    scale = np.maximum(matrix.max(summed, keepdims=True), -matrix.min(summed, keepdims=True)) / np.float32(STEPS)
    scale[scale < np.sqrt(np.finfo(np.float32).tiny)] = 1
    values = matrix / scale
    return wanted.like(np.rint(values, out=values).astype(INT8), scale)


def lookup(table: Int8, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns the rows `ids` (...) of a table (V, D) whose scales are per row, as floats (..., D)."""
    rows = jax.tree.map(lambda x: jnp.take(x, ids, axis=0), table)
    return (rows.qvalue * rows.scale).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def product(equation: str, dtype: np.dtype, out_dtype: np.dtype, x: jax.Array, matrix: Int8) -> jax.Array:
    """Returns jnp.einsum(equation, x, matrix), whose output ends with the axes of the matrix that are not summed.

    The int8 values are exact in `dtype`, so they are multiplied by x in `dtype`, and the result by the scales in
    float32. `qwix.einsum` would round each product of value and scale to `dtype` instead.

    With `matrix.int8_compute` x is quantised too, with a scale for each row (all axes that are not summed), and the
    product is int8 x int8 -> int32. So is the product of the backward pass: there the gradient is multiplied by the
    scales of the matrix and then quantised row by row.

    The backward pass is written out for two reasons: `qwix.quantize` passes no gradient on, and JAX would keep the
    int8 values that the forward pass cast to `dtype`, of all layers of a scan.

    Args:
      equation: of x and matrix, with the letters of axes.
      dtype: the compute dtype; also x's.
      out_dtype: of the result.
    """
    inputs, letters, _ = _letters(equation)
    summed = sum(letter in inputs for letter in letters)
    out = _by_values(equation, x, matrix, summed, matrix.shards[0], dtype, out_dtype)
    return (out.astype(jnp.float32) * _channel_scales(equation, matrix)).astype(out_dtype)


def _forward(equation: str, dtype: np.dtype, out_dtype: np.dtype, x: jax.Array, matrix: Int8):
    return product(equation, dtype, out_dtype, x, matrix), matrix


def _backward(equation: str, dtype: np.dtype, out_dtype: np.dtype, matrix: Int8, slopes: jax.Array):
    inputs, letters, out = _letters(equation)
    slopes = slopes.astype(jnp.float32) * _channel_scales(equation, matrix)
    summed = sum(letter in out for letter in letters)
    back = _by_values(f"{out},{letters}->{inputs}", slopes, matrix, summed, matrix.shards[1], dtype, dtype)
    return back.astype(dtype), None


product.defvjp(_forward, _backward)


def _by_values(
    equation: str, x: jax.Array, matrix: Int8, summed: int, shards: int, dtype: np.dtype, out_dtype: np.dtype
) -> jax.Array:
    """Returns the product of x, whose last `summed` axes are summed over, and the int8 values of a matrix.

    If the first of these axes is sharded, the partial sums of its shards are added in `out_dtype`. The compiler alone
    would send them between the devices as int32, which is twice as much as bfloat16.
    """
    values = matrix.qvalue
    if not matrix.int8_compute:
        return jnp.einsum(equation, x.astype(dtype), values.astype(dtype), preferred_element_type=out_dtype)
    rows = _quantize(x, range(x.ndim - summed))
    if shards == 1:
        return qwix.einsum(equation, rows, values, preferred_element_type=jnp.float32)
    inputs, letters, _ = _letters(equation)
    letter = inputs[-summed]
    equation = equation.replace(letter, f"z{letter}").replace("->", "->z")
    left, right = _split(rows.qvalue, x.ndim - summed, shards), _split(values, letters.index(letter), shards)
    parts = jnp.einsum(equation, left, right, preferred_element_type=jnp.int32)  # (shards, ...)
    # A row's scale has 1 for every axis that is summed over, and the result has the matrix's other axes there.
    scale = rows.scale.reshape(*x.shape[: x.ndim - summed], *[1] * (len(letters) - summed))
    parts = (parts.astype(jnp.float32) * scale).astype(out_dtype)
    return jax.lax.reduce(parts, jnp.zeros((), out_dtype), jax.lax.add, (0,))


def _split(x: jax.Array, axis: int, parts: int) -> jax.Array:
    """Returns x with an axis as two: `parts` times a part."""
    return x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :])


def _quantize(x: jax.Array, axes: Sequence[int]) -> qwix.QArray:
    """Returns x with a float32 scale for each index of `axes`."""
    return qwix.quantize(x.astype(jnp.float32), jnp.int8, channelwise_axes=axes, calibration_method=CALIBRATION)


def _letters(equation: str) -> tuple[str, str, str]:
    """Returns the letters of input, matrix and output."""
    operands, out = equation.split("->")
    return *operands.split(","), out


def _channel_scales(equation: str, matrix: Int8) -> jax.Array:
    """Returns the scales as they are broadcast to the output."""
    inputs, letters, _ = _letters(equation)
    return matrix.scale.squeeze([axis for axis, letter in enumerate(letters) if letter in inputs])
