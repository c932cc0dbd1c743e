"""The attention that vision encoders, connectors, video's temporal merging and language models share."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Returns softmax attention. Each of K key-value heads serves N / K neighbouring query heads.

    Scores, bias and softmax are float32 for inputs of any dtype; the weights are then cast to the query's dtype.
    `jax.nn.dot_product_attention` gives the same numbers but cannot replace this. It has no dropout, which BERT needs,
    and it needs values as wide as the keys, which the temporal merging does not have.

    Args:
      query: (B, S, N, H).
      key: (B, T, K, H).
      value: (B, T, K, V).
      mask: bool, broadcast to (B, S, T), True where a query sees a key. A query that sees none gets the mean of all
        values.
      bias: float32, broadcast to (B, S, T); added to the scores of every head.
      scale: factor of the scores; H^-0.5 when None.
      dropout: applied to the weights (B, K, N / K, S, T).

    Returns:
      (B, S, N, V) in the query's dtype.
    """
    grouped = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[-1])
    scores = jnp.einsum("BSKGH,BTKH->BKGST", grouped, key, preferred_element_type=jnp.float32)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        # Any score vanishes in this sum. Selecting would read and write a constant of the size of the scores on a TPU.
        hidden = jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)
        bias = hidden if bias is None else bias + hidden
    if bias is not None:
        scores = scores + bias[:, None, None]
    weights = softmax(scores, query.dtype)
    if dropout is not None:
        weights = dropout(weights)
    return jnp.einsum("BKGST,BTKV->BSKGV", weights, value).reshape(*query.shape[:3], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def softmax(scores: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns the softmax of float32 scores (..., T) over the last axis, in `dtype`.

    Only this result is kept for the backward pass. JAX's own rule also keeps float32 arrays, which take 30 % more
    memory for the connector's layers in bfloat16.
    """
    return jax.nn.softmax(scores, axis=-1).astype(dtype)


def _softmax_forward(scores: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    weights = softmax(scores, dtype)
    return weights, weights


def _softmax_backward(dtype: DTypeLike, weights: jax.Array, slopes: jax.Array) -> tuple[jax.Array]:
    weights, slopes = weights.astype(jnp.float32), slopes.astype(jnp.float32)
    return (weights * (slopes - jnp.sum(weights * slopes, -1, keepdims=True)),)


softmax.defvjp(_softmax_forward, _softmax_backward)
