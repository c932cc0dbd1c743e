"""The frozen sentence encoder whose embeddings of captions the contrastive loss compares pictures with."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from simvlg_jax.models import bert, layers


class SentenceEncoder(nn.Module):
    """A BERT that embeds sentences, without dropout because it is never trained.

    Attributes:
      pooling: "mean" of the token states, normalised (all-MiniLM-L6-v2), or "pooler", BERT's tanh layer on the class
        token (sup-simcse-bert-base-uncased, the published choice).
    """

    width: int
    depth: int
    num_heads: int
    vocab_size: int = 30522
    pooling: str = "mean"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """ids, mask (B, L) int32 -> (B, D) float32; of unit length if it is a mean."""
        init = layers.partitioned(layers.NORMAL_INIT, "vocab", "embed")
        words = self.param("word", init, (self.vocab_size, self.width))
        x = bert.BertEmbeddings(dropout=0.0, name="embeddings")(words[ids].astype(self.dtype))
        for i in range(self.depth):
            x = bert.BertLayer(self.num_heads, dropout=0.0, dtype=self.dtype, name=f"layer_{i}")(x, mask).tokens
        if self.pooling == "pooler":
            dense = layers.torch_dense(self.width, self.width, ("embed", "mlp"), dtype=self.dtype, name="pooler")
            return jnp.tanh(dense(x[:, 0]).astype(jnp.float32))
        weights = mask[..., None].astype(jnp.float32)
        pooled = jnp.sum(x * weights, 1) / jnp.maximum(weights.sum(1), 1.0)
        return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)
