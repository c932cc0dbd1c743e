"""Layers that the vision encoder, the connector and the sentence encoder share.

Parameters carry logical axis names ('embed', 'heads', 'head_dim', 'mlp', ...) that `parallel.mesh` maps to the
device mesh. Heads are an axis of their own in the kernels, so that tensor parallelism splits whole heads.

A key's bias adds the same to all scores of a query, so softmax takes it out again and its gradient is zero. Where keys
have a bias it is held constant (`bias_grad=False`): differentiating it gives rounding noise, which AdamW would magnify.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Initializer = nn.initializers.Initializer
BERT_INIT = nn.initializers.normal(0.02)


def partitioned(init: Initializer, *axes: str | None) -> Initializer:
    return nn.with_logical_partitioning(init, axes)


def torch_linear_init(fan_in: int) -> Initializer:
    """PyTorch's nn.Linear default for weight and bias: uniform in +-1/sqrt(fan_in)."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def split_batch(x: jax.Array) -> jax.Array:
    """Keeps the first axis, and no other, split over the devices, if the caller has named a mesh."""
    return nn.with_logical_constraint(x, ("batch", *[None] * (x.ndim - 1)))


class LayerNorm(nn.Module):
    """LayerNorm with float32 statistics by the two-pass formula, in and out in the input's dtype."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # (..., D) -> (..., D)
        scale = self.param("scale", partitioned(nn.initializers.ones, "norm"), x.shape[-1:])
        bias = self.param("bias", partitioned(nn.initializers.zeros, "norm"), x.shape[-1:])
        wide = x.astype(jnp.float32)
        wide = wide - wide.mean(-1, keepdims=True)
        variance = jnp.mean(jnp.square(wide), -1, keepdims=True)
        return (wide * jax.lax.rsqrt(variance + self.epsilon) * scale + bias).astype(x.dtype)


class Linear(nn.Module):
    """y = x W + b; `axes` name W's two axes.

    Attributes:
      features: output width.
      axes: logical names of the kernel's (input, output) axes.
      kernel_init, bias_init: initialisers; PyTorch's nn.Linear default when None.
      dtype: compute dtype.
      use_bias: whether there is a b.
      bias_grad: whether b takes a gradient.
    """

    features: int
    axes: tuple[str, str]
    kernel_init: Initializer | None = None
    bias_init: Initializer | None = None
    dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    bias_grad: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # (..., I) -> (..., O)
        fan_in = x.shape[-1]
        default = torch_linear_init(fan_in)
        kernel_init = partitioned(self.kernel_init or default, *self.axes)
        bias_init = partitioned(self.bias_init or default, self.axes[1])
        kernel = self.param("kernel", kernel_init, (fan_in, self.features))
        out = x.astype(self.dtype) @ kernel.astype(self.dtype)
        if self.use_bias:
            bias = self.param("bias", bias_init, (self.features,)).astype(self.dtype)
            out = out + (bias if self.bias_grad else jax.lax.stop_gradient(bias))
        return out


class Projection(nn.Module):
    """One of query, key or value: (B, T, D) -> (B, T, H, K), with its kernel as (D, H, K)."""

    num_heads: int
    head_dim: int
    use_bias: bool = True
    bias_grad: bool = True
    kernel_init: Initializer = BERT_INIT
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.num_heads, self.head_dim)
        kernel = self.param("kernel", partitioned(self.kernel_init, "embed", "heads", "head_dim"), shape)
        out = jnp.einsum("BTD,DHK->BTHK", x.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            bias = self.param("bias", partitioned(nn.initializers.zeros, "heads", "head_dim"), shape[1:])
            bias = bias.astype(self.dtype)
            out = out + (bias if self.bias_grad else jax.lax.stop_gradient(bias))
        return out


class MergeHeads(nn.Module):
    """The attention's output projection: (B, T, H, K) -> (B, T, D), with its kernel as (H, K, D)."""

    features: int
    kernel_init: Initializer = BERT_INIT
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*x.shape[-2:], self.features)
        kernel = self.param("kernel", partitioned(self.kernel_init, "heads", "head_dim", "embed"), shape)
        bias = self.param("bias", partitioned(nn.initializers.zeros, "embed"), (self.features,))
        return jnp.einsum("BTHK,HKD->BTD", x, kernel.astype(self.dtype)) + bias.astype(self.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """The exact (erf) GELU of BERT and EVA."""
    return nn.gelu(x, approximate=False)


def quick_gelu(x: jax.Array) -> jax.Array:
    """CLIP's approximation, x sigmoid(1.702 x)."""
    return x * nn.sigmoid(1.702 * x)


class Mlp(nn.Module):
    """Two linear layers with an activation between: (B, T, D) -> (B, T, D)."""

    hidden: int
    activation: Callable[[jax.Array], jax.Array] = gelu
    kernel_init: Initializer = BERT_INIT
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = {"kernel_init": self.kernel_init, "bias_init": nn.initializers.zeros, "dtype": self.dtype}
        h = Linear(self.hidden, ("embed", "mlp"), name="fc1", **init)(x)
        return Linear(x.shape[-1], ("mlp", "embed"), name="fc2", **init)(self.activation(h))
