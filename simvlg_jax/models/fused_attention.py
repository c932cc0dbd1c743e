"""Attention that stores no scores on a TPU: a Pallas kernel for the few hundred tokens of a picture.

A head of a picture fits into a chip's own memory, scores included: ViT-g has 257 tokens of 88 numbers, and 264 kB of
scores. So one step of the grid computes one head, in one pass. Kernels for long sequences (jax's splash attention) need
their tokens and heads padded to whole tiles, which here would move as many bytes as it saves.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from simvlg_jax.models.attention import attend

BATCH_AXES, HEAD_AXIS = ("data", "fsdp"), "tensor"  # of `parallel.mesh`


@jax.custom_vjp
def attend_fused(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Returns `attend(query, key, value)` of (B, S, N, H) each, by the kernel in a training step on TPUs.

    The compiler cannot split a kernel over devices, so the kernel is used only where `parallel.mesh` has put the mesh
    into context. The backward pass is that of `attend`, which computes the scores again.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend(query, key, value)
    heads = HEAD_AXIS if query.shape[2] % mesh.shape[HEAD_AXIS] == 0 else None
    spec = PartitionSpec(BATCH_AXES, None, heads, None)
    split = jax.shard_map(_on_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return split(query, key, value)


def _forward(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return attend_fused(query, key, value), (query, key, value)


def _backward(inputs: tuple[jax.Array, ...], slopes: jax.Array) -> tuple[jax.Array, ...]:
    return jax.vjp(attend, *inputs)[1](slopes)


attend_fused.defvjp(_forward, _backward)


def _on_device(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(query, key, value, tpu=run_kernel, default=attend)


def run_kernel(query: jax.Array, key: jax.Array, value: jax.Array, interpret: bool = False) -> jax.Array:
    """Returns `attend(query, key, value)` of (B, S, N, H) each, on one TPU.

    Args:
      interpret: whether to run the kernel step by step on any machine.
    """
    batch, tokens, heads, width = query.shape
    block = pl.BlockSpec((1, 1, tokens, width), lambda b, n: (b, n, 0, 0))
    products = 2 * batch * heads * tokens**2 * width  # of two matrices each
    run = pl.pallas_call(
        _one_head,
        grid=(batch, heads),
        in_specs=[block] * 3,
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((batch, heads, tokens, width), query.dtype),
        cost_estimate=pl.CostEstimate(
            flops=2 * products,
            transcendentals=batch * heads * tokens**2,
            bytes_accessed=4 * query.size * query.dtype.itemsize,
        ),
        interpret=interpret,
        name="attend_fused",
    )
    return run(*(x.swapaxes(1, 2) for x in (query, key, value))).swapaxes(1, 2)


def _one_head(query_ref, key_ref, value_ref, out_ref) -> None:
    """Computes what `attend` does, on blocks (1, 1, S, H)."""
    query, key, value = query_ref[0, 0], key_ref[0, 0], value_ref[0, 0]
    # A TPU multiplies bfloat16 in one way, and the compiler of kernels refuses to be asked for a higher precision.
    exact = jax.lax.Precision.DEFAULT if query.dtype == jnp.bfloat16 else None
    dot = functools.partial(jax.lax.dot_general, precision=exact, preferred_element_type=jnp.float32)
    scores = dot(query, key, (((1,), (1,)), ((), ())))
    weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5, axis=-1).astype(value.dtype)  # (S, S)
    out_ref[0, 0] = dot(weights, value, (((1,), (0,)), ((), ()))).astype(out_ref.dtype)
