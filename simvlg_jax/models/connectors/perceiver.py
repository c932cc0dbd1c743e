"""The Perceiver Resampler of Flamingo (arXiv 2204.14198, section 2.1 and appendix A.1.1)."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from simvlg_jax.models import layers
from simvlg_jax.models.attention import attend
from simvlg_jax.models.bert import size_of
from simvlg_jax.models.connectors.connector import ConnectorOutput
from simvlg_jax.models.dropout import Dropout
from simvlg_jax.models.encoders.frames import VisualTokens

EPSILON = 1e-5


def squared_relu(x: jax.Array) -> jax.Array:
    """Flamingo's activation in the resampler (appendix B.1.1)."""
    return jnp.square(nn.relu(x))


class PerceiverLayer(nn.Module):
    """Latents attend to the visual tokens and to themselves, then an MLP; LayerNorm before each.

    Attributes:
      num_heads: attention heads.
      dropout: rate on attention weights and on both residual branches. Published: 0.
    """

    num_heads: int
    dropout: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, latents: jax.Array, visual: jax.Array) -> jax.Array:
        """Returns latents (B, P, D), from latents (B, P, D) and visual tokens (B, T, D)."""
        width, drop = latents.shape[-1], Dropout(self.dropout)
        heads, dtype = (width, self.num_heads, width // self.num_heads), self.dtype
        asking = layers.LayerNorm(EPSILON, name="latent_norm")(latents)
        seen = jnp.concatenate([layers.LayerNorm(EPSILON, name="visual_norm")(visual), asking], 1)  # (B, T + P, D)
        query = layers.split_heads(*heads, dtype=dtype, name="query")(asking)
        key = layers.split_heads(*heads, bias_grad=False, dtype=dtype, name="key")(seen)
        value = layers.split_heads(*heads, dtype=dtype, name="value")(seen)
        context = attend(query, key, value, dropout=drop)  # (B, P, N, H)
        latents = latents + drop(layers.merge_heads(*heads, dtype=dtype, name="attention_out")(context))
        x = layers.LayerNorm(EPSILON, name="mlp_norm")(latents)
        return layers.split_batch(latents + drop(layers.Mlp(4 * width, squared_relu, dtype, name="mlp")(x)))


class Perceiver(nn.Module):
    """A linear map to the width of the latents, then the resampler and a last LayerNorm.

    Flamingo's latents are as wide as the visual features and need no such map. Its embeddings of time are
    those of `SimVLG.max_frames`, with all tokens of the frames joined.

    Attributes:
      width, depth, num_heads: sizes, see `bert.BERT_SIZES`.
      queries: number of latents P.
      dropout: see `PerceiverLayer`.
    """

    width: int
    depth: int
    num_heads: int
    queries: int
    dropout: float = 0.1
    dtype: DTypeLike = jnp.float32

    merges, class_token = (), False  # no layer merges, and no class token comes out

    @nn.compact
    def __call__(self, visual: jax.Array, source_map: jax.Array | None = None) -> ConnectorOutput:
        """Returns P tokens, see `Connector`. The source map of a vision encoder that merges is not needed."""
        axes = ("mlp", "embed")
        visual = layers.torch_dense(visual.shape[-1], self.width, axes, dtype=self.dtype, name="vl_proj")(visual)
        init = layers.partitioned(layers.NORMAL_INIT, None, "embed")
        latents = self.param("latents", init, (self.queries, self.width))
        x = jnp.broadcast_to(latents.astype(visual.dtype), (len(visual), *latents.shape))
        for i in range(self.depth):
            x = PerceiverLayer(self.num_heads, self.dropout, self.dtype, name=f"layer_{i}")(x, visual)
        return ConnectorOutput(layers.LayerNorm(EPSILON, name="norm")(x))


def build_perceiver(connector: Mapping, seen: VisualTokens, dtype: DTypeLike) -> Perceiver:
    """Returns the resampler of a config's `connector`. Raises ValueError for an unknown size."""
    return Perceiver(**size_of(connector), queries=connector.queries, dropout=connector.dropout, dtype=dtype)
