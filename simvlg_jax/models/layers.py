"""Layers that the vision encoder, the connector, the sentence encoder and the language models share.

Parameters carry logical axis names ('embed', 'heads', 'head_dim', 'mlp', ...) that `parallel.mesh` maps to the
device mesh. Heads are an axis of their own in the kernels, so that tensor parallelism splits whole heads.

The letters of axes are the same everywhere: B batch, S tokens (queries), T tokens (keys), N query heads, K key-value
heads, H head_dim, D width, F hidden width of an MLP, V vocabulary.

A key's bias adds the same number to all scores of a query. Softmax ignores that, so the exact gradient of the bias is
zero. Keys that have a bias hold it constant (`bias_grad=False`): a computed gradient would be rounding noise, which
AdamW would magnify.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from simvlg_jax.models import int8

Initializer = nn.initializers.Initializer
NORMAL_INIT = nn.initializers.normal(0.02)  # BERT's, and OPT's and LLaMA's


def partitioned(init: Initializer, *axes: str | None) -> Initializer:
    """Returns the initialiser with logical names for the axes of its parameter."""
    return nn.with_logical_partitioning(init, axes)


@struct.dataclass
class Matrix(nn.LogicallyPartitioned):
    """The box of a matrix that is multiplied by `linear`.

    Attributes:
      summed: axes that the product sums over, counted from the end: a stack of layers has one more axis at the start.
    """

    summed: tuple[int, ...] = struct.field(pytree_node=False, default=())


def matrix(init: Initializer, *axes: str | None, summed: tuple[int, ...]) -> Initializer:
    """Returns the initialiser of a `Matrix` with logical names for its axes; `summed` as there."""

    def boxed(*arguments) -> Matrix:
        return Matrix(init(*arguments), axes, summed=summed)

    return boxed


def split_batch(x: jax.Array) -> jax.Array:
    """Constrains x (B, ...) to be sharded by its first axis alone; without a mesh in context it does nothing."""
    return nn.with_logical_constraint(x, ("batch", *[None] * (x.ndim - 1)))


class LayerNorm(nn.LayerNorm):
    """Flax's LayerNorm with named axes and the two-pass variance, in float32; the result has the input's dtype.

    Of the forward pass only the input is kept, in its own dtype. JAX's own rule keeps two float32 arrays of its size.
    """

    use_fast_variance: bool = False
    scale_init: Initializer = partitioned(nn.initializers.ones, "norm")
    bias_init: Initializer = partitioned(nn.initializers.zeros, "norm")

    def __call__(self, x: jax.Array) -> jax.Array:  # (..., D) -> (..., D)
        return nn.remat(nn.LayerNorm.__call__, prevent_cse=False)(self, x).astype(x.dtype)


def linear(
    equation: str,
    x: jax.Array,
    kernel: jax.Array | int8.Int8,
    dtype: DTypeLike,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
    """Returns jnp.einsum(equation, x, kernel) in `dtype`. Every weight matrix is multiplied here and nowhere else."""
    if isinstance(kernel, int8.Int8):
        dtype = jnp.dtype(dtype)
        return int8.product(equation, dtype, jnp.dtype(preferred_element_type or dtype), x.astype(dtype), kernel)
    return jnp.einsum(equation, x.astype(dtype), kernel.astype(dtype), preferred_element_type=preferred_element_type)


def lookup(table: jax.Array | int8.Int8, ids: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns the rows `ids` (B, S) of a table (V, D) in `dtype`: (B, S, D)."""
    if isinstance(table, int8.Int8):
        return int8.lookup(table, ids, dtype)
    return jnp.take(table, ids, axis=0).astype(dtype)


class Einsum(nn.Module):
    """A linear map whose kernel keeps its axes apart.

    Attributes:
      equation: of input and kernel, for example "BSD,DNH->BSNH".
      shape: the shape of the kernel; the axes that are summed over come first.
      axes: logical names of the kernel's axes.
      use_bias: whether to add a bias. Its axes are those of the kernel that are not summed over.
      bias_grad: whether the bias gets a gradient.
      kernel_init, bias_init: initialisers.
      dtype: compute dtype.
    """

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    use_bias: bool = True
    bias_grad: bool = True
    kernel_init: Initializer = NORMAL_INIT
    bias_init: Initializer = nn.initializers.zeros
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs, letters = self.equation.split("->")[0].split(",")
        summed = sum(letter in inputs for letter in letters)
        last = tuple(range(-len(self.shape), summed - len(self.shape)))
        kernel = self.param("kernel", matrix(self.kernel_init, *self.axes, summed=last), self.shape)
        out = linear(self.equation, x, kernel, self.dtype)
        if self.use_bias:
            bias = self.param("bias", partitioned(self.bias_init, *self.axes[summed:]), self.shape[summed:])
            out = out + (bias if self.bias_grad else jax.lax.stop_gradient(bias)).astype(self.dtype)
        return out


def dense(fan_in: int, features: int, axes: tuple[str | None, str | None], **options) -> Einsum:
    """Returns y = x W + b over the last axis: (..., fan_in) -> (..., features)."""
    return Einsum("...D,DF->...F", (fan_in, features), axes, **options)


def torch_dense(fan_in: int, features: int, axes: tuple[str | None, str | None], **options) -> Einsum:
    """Returns `dense` initialised like PyTorch's nn.Linear: kernel and bias uniform in +-1/sqrt(fan_in)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return dense(fan_in, features, axes, kernel_init=init, bias_init=init, **options)


def split_heads(width: int, num_heads: int, head_dim: int, heads: str = "heads", **options) -> Einsum:
    """Returns the map to queries, keys or values: (B, S, D) -> (B, S, N, H)."""
    return Einsum("BSD,DNH->BSNH", (width, num_heads, head_dim), ("embed", heads, "head_dim"), **options)


def merge_heads(width: int, num_heads: int, head_dim: int, **options) -> Einsum:
    """Returns the output map of attention: (B, S, N, H) -> (B, S, D)."""
    return Einsum("BSNH,NHD->BSD", (num_heads, head_dim, width), ("heads", "head_dim", "embed"), **options)


def gelu(x: jax.Array) -> jax.Array:
    """The exact (erf) GELU of BERT and EVA, computed in float32.

    JAX's form takes erfc, in the dtype of x. On a TPU it stores the signs of x in a pass of their own.
    """
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


def quick_gelu(x: jax.Array) -> jax.Array:
    """CLIP's approximation, x sigmoid(1.702 x)."""
    return x * nn.sigmoid(1.702 * x)


class Mlp(nn.Module):
    """Two linear layers with an activation between: (..., D) -> (..., D)."""

    hidden: int
    activation: Callable[[jax.Array], jax.Array] = gelu
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        h = dense(width, self.hidden, ("embed", "mlp"), dtype=self.dtype, name="fc1")(x)
        return dense(self.hidden, width, ("mlp", "embed"), dtype=self.dtype, name="fc2")(self.activation(h))
