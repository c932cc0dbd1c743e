"""The TomeFormer: a BERT encoder over visual tokens that merges similar ones in every layer (SimVLG, 3.2)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from simvlg_jax.models import bert
from simvlg_jax.models.connectors import token_merging


@struct.dataclass
class TomeFormerOutput:
    """What the connector gives.

    Attributes:
      tokens: (B, N', D), the class token first.
      source_map: (B, N) int32, the output token that each input token became part of.
      sizes: (B, N') float32, how many input tokens each output token is made of.
    """

    tokens: jax.Array
    source_map: jax.Array
    sizes: jax.Array


class TomeFormer(nn.Module):
    """BERT layers over visual tokens, unrolled because each has its own token count.

    There is no attention mask: every input is a visual token. Visual tokens take BERT's own position rows
    0..N-1 and token type 0, as published.

    Attributes:
      width, depth, num_heads: sizes, see `bert.BERT_SIZES`.
      merges: tokens to remove in each layer, from `token_merging.merge_schedule`.
      dropout: rate at BERT's usual places.
      weighted_mean, proportional_attention: ToMe's ways of accounting for sizes, which SimVLG leaves out; see
        `bert.BertLayer`.
    """

    width: int
    depth: int
    num_heads: int
    merges: tuple[int, ...]
    dropout: float = 0.1
    weighted_mean: bool = False
    proportional_attention: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> TomeFormerOutput:
        """x: (B, N, D), N at most 512."""
        source_map = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        x = bert.BertEmbeddings(dropout=self.dropout, name="embeddings")(x.astype(self.dtype))
        for i, r in enumerate(self.merges):
            layer = bert.BertLayer(
                self.num_heads,
                r,
                self.dropout,
                self.weighted_mean,
                self.proportional_attention,
                dtype=self.dtype,
                name=f"layer_{i}",
            )
            out = layer(x, sizes=token_merging.slot_sizes(source_map, x.shape[1]))
            x = out.tokens
            if out.slots is not None:
                source_map = token_merging.compose(source_map, out.slots)
        return TomeFormerOutput(x, source_map, token_merging.slot_sizes(source_map, x.shape[1]))
