"""A BERT that embeds sentences: frozen in the contrastive losses of captions and pictures, trained in the P-Former."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from simvlg_jax.models import bert, layers


class SentenceEncoder(nn.Module):
    """A BERT over sentences alone.

    Attributes:
      pooling: "mean" is the mean of the token states, scaled to unit length (all-MiniLM-L6-v2). "pooler" is BERT's tanh
        layer on the class token (sup-simcse-bert-base-uncased, the published choice). "class" is the class token.
      dropout: rate at BERT's usual places; 0 where it is frozen.
      hidden: width inside the MLPs; None for 4 times `width`.
    """

    width: int
    depth: int
    num_heads: int
    vocab_size: int = 30522
    pooling: str = "mean"
    dropout: float = 0.0
    hidden: int | None = None
    max_positions: int = bert.MAX_POSITIONS
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns embeddings (B, D) float32 of ids and mask (B, L) int32."""
        init = layers.partitioned(layers.NORMAL_INIT, "vocab", "embed")
        words = self.param("word", init, (self.vocab_size, self.width))
        x = bert.BertEmbeddings(self.max_positions, dropout=self.dropout, name="embeddings")(
            words[ids].astype(self.dtype)
        )
        options = dict(dropout=self.dropout, hidden=self.hidden, dtype=self.dtype)
        for i in range(self.depth):
            x = bert.BertLayer(self.num_heads, **options, name=f"layer_{i}")(x, mask).tokens
        if self.pooling == "class":
            return x[:, 0].astype(jnp.float32)
        if self.pooling == "pooler":
            dense = layers.torch_dense(self.width, self.width, ("embed", "mlp"), dtype=self.dtype, name="pooler")
            return jnp.tanh(dense(x[:, 0]).astype(jnp.float32))
        weights = mask[..., None].astype(jnp.float32)
        pooled = jnp.sum(x * weights, 1) / jnp.maximum(weights.sum(1), 1.0)
        return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)
