"""Temporal attentive soft merging: how a ViT shares what it sees across the frames of a clip (SimVLG, section 3.3)."""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from simvlg_jax.models import layers


class TemporalMerge(nn.Module):
    """Each token attends to the tokens of its own place in all frames; the result is scaled by a learned alpha.

    Values are the tokens themselves, without projections, so each output is a soft merge of F tokens. alpha is 0 at
    first: an image model starts unchanged.

    Attributes:
      width: of queries and keys, all heads together; the softmax is scaled by width^-0.5, as published.
      num_heads: heads; each merges its own slice of the token.
    """

    width: int = 256
    num_heads: int = 8
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # (B, F, N, D) -> (B, F, N, D), to be added to x
        init = {"kernel_init": layers.BERT_INIT, "bias_init": nn.initializers.zeros, "dtype": self.dtype}
        query = layers.Linear(self.width, ("embed", "mlp"), name="query", **init)(x)
        key = layers.Linear(self.width, ("embed", "mlp"), bias_grad=False, name="key", **init)(x)
        alpha = self.param("alpha", layers.partitioned(nn.initializers.zeros), ())
        query, key, value = (
            einops.rearrange(t, "B F N (H K) -> B F N H K", H=self.num_heads)
            for t in (query, key, x.astype(self.dtype))
        )
        scores = jnp.einsum("BTNHK,BSNHK->BNHTS", query * self.width**-0.5, key)
        weights = jax.nn.softmax(scores.astype(jnp.float32), -1).astype(x.dtype)
        merged = einops.rearrange(jnp.einsum("BNHTS,BSNHV->BTNHV", weights, value), "B T N H V -> B T N (H V)")
        return alpha.astype(x.dtype) * merged
