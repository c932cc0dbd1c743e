"""Temporal attentive soft merging, which mixes a ViT's tokens across the frames of a clip (SimVLG, section 3.3)."""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from simvlg_jax.models import layers
from simvlg_jax.models.attention import attend


class TemporalMerge(nn.Module):
    """Lets each token attend to the tokens at the same place in all F frames; a learned alpha scales the result.

    The values are the tokens themselves, without a projection, so each output is a soft merge of F tokens. alpha starts
    at 0, so an image model starts unchanged. The collection "intermediates" gets `drawn`, the mean over places, (B, F).

    Attributes:
      width: of queries and keys, all heads together. The scores are scaled by width^-0.5, as published.
      num_heads: heads; each merges its own slice of the token.
    """

    width: int = 256
    num_heads: int = 8
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # (B, F, P, D) -> (B, F, P, D), to be added to x
        sizes, dtype = (x.shape[-1], self.width, ("embed", "mlp")), self.dtype
        query = layers.dense(*sizes, dtype=dtype, name="query")(x)
        key = layers.dense(*sizes, bias_grad=False, dtype=dtype, name="key")(x)
        alpha = self.param("alpha", layers.partitioned(nn.initializers.zeros), ())
        query, key, value = (
            einops.rearrange(t, "B F P (N H) -> (B P) F N H", N=self.num_heads)
            for t in (query, key, x.astype(self.dtype))
        )
        merged = attend(query, key, value, scale=self.width**-0.5)
        if self.is_mutable_collection("intermediates"):
            shares = drawn(query, key, self.width**-0.5).reshape(x.shape[0], -1, x.shape[1])
            self.sow("intermediates", "drawn", shares.mean(1))
        merged = einops.rearrange(merged, "(B P) F N H -> B F P (N H)", B=x.shape[0])
        return alpha.astype(x.dtype) * merged.astype(x.dtype)


def drawn(query: jax.Array, key: jax.Array, scale: float) -> jax.Array:
    """Returns the share of the attention that each frame draws, the mean over heads and asking frames.

    Args:
      query, key: (X, F, N, H).

    Returns:
      (X, F) float32, with the sum 1.
    """
    scores = jnp.einsum("XFNH,XGNH->XNFG", query, key, preferred_element_type=jnp.float32) * scale
    return jax.nn.softmax(scores, -1).mean((1, 2))
