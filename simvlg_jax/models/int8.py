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
STEPS = 127.5  # of the largest magnitude of a channel, as in qwix: both ends are then off by half a step at most


@struct.dataclass
class Int8(qwix.QArray):
    """A matrix, qvalue * scale: a pytree, so it is scanned, sharded and jitted like the array that it stands for.

    Attributes:
      qvalue: int8, of the matrix's shape.
      scale: float32, of the same shape but with 1 for every axis that a product sums over.
      int8_compute: whether products are computed in int8 too, see `product`.
    """

    int8_compute: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def of(cls, qvalue, scale, int8_compute: bool) -> "Int8":
        """Returns one from any pair of leaves: arrays, their shapes or their shardings."""
        return cls(qvalue, scale, qtype=INT8, int8_compute=int8_compute)

    @property
    def summed(self) -> tuple[int, ...]:
        """The axes that share a scale, counted from the end."""
        sizes = zip(self.scale.shape, self.qvalue.shape, strict=True)
        return tuple(axis - self.ndim for axis, (scales, size) in enumerate(sizes) if scales < size)


def scale_shape(shape: tuple[int, ...], summed: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of the scales of a matrix. `summed` are axes that a product sums over, counted from the end."""
    return tuple(1 if axis - len(shape) in summed else size for axis, size in enumerate(shape))


def quantize(matrix: jax.Array, summed: Sequence[int], int8_compute: bool) -> Int8:
    """Returns a matrix, or a stack of them, as int8; see `scale_shape`. It can be traced."""
    matrix = matrix.astype(jnp.float32)
    found = qwix.quantize(matrix, jnp.int8, channelwise_axes=_others(matrix, summed))
    return Int8.of(found.qvalue, found.scale, int8_compute)


def quantize_on_host(matrix: np.ndarray, summed: Sequence[int], int8_compute: bool) -> Int8:
    """Returns `quantize` as NumPy arrays.

    The bits are the same on any machine. Accelerators round divisions differently, and a run that resumes on other
    hardware would not recognise its frozen weights.
    """
    matrix = np.asarray(matrix, np.float32)
    scale = np.maximum(matrix.max(tuple(summed), keepdims=True), -matrix.min(tuple(summed), keepdims=True))
    scale /= np.float32(STEPS)
    scale[scale < np.sqrt(np.finfo(np.float32).tiny)] = 1
    values = matrix / scale
    np.clip(np.rint(values, out=values), -128, 127, out=values)
    return Int8.of(values.astype(INT8), scale, int8_compute)


def dequantize(matrix: Int8, dtype: DTypeLike) -> jax.Array:
    """Returns the matrix as floats, rounded once."""
    return qwix.dequantize(matrix).astype(dtype)


def lookup(table: Int8, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns the rows `ids` (...) of a table (V, D) whose scales are per row, as floats (..., D)."""
    rows = jax.tree.map(lambda x: jnp.take(x, ids, axis=0), table)
    return (rows.qvalue * rows.scale).astype(dtype)


def product(equation: str, x: jax.Array, matrix: Int8, dtype: DTypeLike, out_dtype: DTypeLike) -> jax.Array:
    """Returns jnp.einsum(equation, x, matrix), where the output ends with the axes of the matrix that are not summed.

    The int8 values are exact in `dtype`, so the product is of x in `dtype` and these values. The scales are applied to
    the result, in float32. `qwix.einsum` would round every product of value and scale to `dtype` instead.

    With `matrix.int8_compute` x is quantised too, with a scale for each row (all axes that are not summed), and the
    product is int8 x int8 -> int32. So is the product of the backward pass, in which the gradient is multiplied by the
    scales of the matrix and then quantised with a scale for each row. (Gradients do not pass through `qwix.quantize`.)
    """
    x = x.astype(dtype)
    if matrix.int8_compute:
        return _int8_product(equation, jnp.dtype(dtype), jnp.dtype(out_dtype), x, matrix)
    out = jnp.einsum(equation, x, matrix.qvalue.astype(dtype), preferred_element_type=out_dtype)
    return (out.astype(jnp.float32) * _channel_scales(equation, matrix)).astype(out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _int8_product(equation: str, dtype: np.dtype, out_dtype: np.dtype, x: jax.Array, matrix: Int8) -> jax.Array:
    inputs, letters, _ = _letters(equation)
    rows = _quantize_rows(x.astype(jnp.float32), sum(letter in inputs for letter in letters))
    return qwix.einsum(equation, rows, matrix, preferred_element_type=jnp.float32).astype(out_dtype)


def _forward(equation: str, dtype: np.dtype, out_dtype: np.dtype, x: jax.Array, matrix: Int8):
    return _int8_product(equation, dtype, out_dtype, x, matrix), matrix


def _backward(equation: str, dtype: np.dtype, out_dtype: np.dtype, matrix: Int8, slopes: jax.Array):
    inputs, letters, out = _letters(equation)
    slopes = slopes.astype(jnp.float32) * _channel_scales(equation, matrix)
    rows = _quantize_rows(slopes, sum(letter in out for letter in letters))
    back = qwix.einsum(f"{out},{letters}->{inputs}", rows, matrix.qvalue, preferred_element_type=jnp.float32)
    return back.astype(dtype), None


_int8_product.defvjp(_forward, _backward)


def _quantize_rows(x: jax.Array, count: int) -> qwix.QArray:
    """Returns x as int8 with a scale for each row over its last `count` axes."""
    return qwix.quantize(x, jnp.int8, channelwise_axes=_others(x, range(-count, 0)))


def _others(x: jax.Array, axes: Sequence[int]) -> list[int]:
    return [axis for axis in range(x.ndim) if axis - x.ndim not in axes]


def _letters(equation: str) -> tuple[str, str, str]:
    """Returns the letters of input, matrix and output."""
    operands, out = equation.split("->")
    return *operands.split(","), out


def _channel_scales(equation: str, matrix: Int8) -> jax.Array:
    """Returns the scales as they are broadcast to the output."""
    inputs, letters, _ = _letters(equation)
    return matrix.scale.squeeze([axis for axis, letter in enumerate(letters) if letter in inputs])
