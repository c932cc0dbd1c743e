"""BERT's embeddings and its layer, which has LayerNorm after each residual."""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

from simvlg_jax.models import layers, token_merging
from simvlg_jax.models.attention import attend
from simvlg_jax.models.dropout import Dropout

MAX_POSITIONS = 512
BERT_SIZES = {
    "base": dict(width=768, depth=12, num_heads=12),  # bert-base-uncased, the published connector
    "minilm_l6": dict(width=384, depth=6, num_heads=12),  # all-MiniLM-L6-v2
    "tiny": dict(width=32, depth=2, num_heads=2),
}


def size_of(connector: Mapping) -> dict[str, int]:
    """Returns the row of BERT_SIZES that a config's `connector` names. Raises ValueError if there is none."""
    if connector.size not in BERT_SIZES:
        raise ValueError(f"connector.size is {connector.size!r}; it takes {', '.join(map(repr, BERT_SIZES))}")
    return BERT_SIZES[connector.size]


@struct.dataclass
class LayerOutput:
    """What a `BertLayer` returns.

    Attributes:
      tokens: (B, S', D).
      slots: (B, S) int32, the output token that each input token became part of; None if none was merged.
    """

    tokens: jax.Array
    slots: jax.Array | None


class KeyValue(NamedTuple):
    """The keys and values of one attention, (B, T, N, H) each."""

    key: jax.Array
    value: jax.Array


class BertEmbeddings(nn.Module):
    """Adds learned positions and token type 0, then LayerNorm and dropout: (B, S, D) -> (B, S, D)."""

    max_positions: int = MAX_POSITIONS
    type_vocab: int = 2
    dropout: float = 0.1
    epsilon: float = 1e-12

    @nn.compact
    def __call__(self, x: jax.Array, source_map: jax.Array | None = None, rows: np.ndarray | None = None) -> jax.Array:
        """Applies the layer.

        Args:
          x: (B, S, D).
          source_map: (B, N) int32, which of the S tokens each of N former tokens became part of. Each token then gets
            the mean position of the former tokens that it is made of. None: token i gets position i.
          rows: (N,) int, the position of each former token, or of each token without a source map; None: its number.
        """
        width, init = x.shape[-1], layers.partitioned(layers.NORMAL_INIT, None, "embed")
        positions = self.param("position", init, (self.max_positions, width))
        types = self.param("token_type", init, (self.type_vocab, width))
        positions = positions if rows is None else positions[rows]
        places = positions[: x.shape[1]]
        if source_map is not None:
            places = jnp.broadcast_to(positions[: source_map.shape[1]], (*source_map.shape, width))
            places = token_merging.merge(places, source_map, x.shape[1])
        x = x + places.astype(x.dtype) + types[0].astype(x.dtype)
        x = layers.LayerNorm(self.epsilon, name="norm")(x)
        return layers.split_batch(Dropout(self.dropout)(x))


class BertLayer(nn.Module):
    """Self-attention, an optional merge of r tokens, then the MLP; LayerNorm after each residual.

    The merge (SimVLG, section 3.2) comes between attention and MLP: attention sees S tokens, the MLP S - r. It
    compares tokens by the keys of this layer, averaged over the heads.

    Attributes:
      num_heads: attention heads.
      merge_r: number r of tokens to merge away; 0 for a plain BERT layer.
      class_token: whether the first token is a class token. A class token is never merged.
      weighted_mean: whether a merge weights each token by the number of inputs it is made of. Published: no.
      proportional_attention: whether a merged token draws as much attention as all the inputs it is made of.
      dropout: rate on attention weights and on both residual branches.
      hidden: width inside the MLP; None for 4 times that of the tokens.
    """

    num_heads: int
    merge_r: int = 0
    class_token: bool = True
    dropout: float = 0.1
    weighted_mean: bool = False
    proportional_attention: bool = False
    hidden: int | None = None
    epsilon: float = 1e-12
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None, sizes: jax.Array | None = None) -> LayerOutput:
        """Applies the layer.

        Args:
          x: (B, S, D).
          mask: (B, S), 1 for real tokens; None for visual tokens, which are all real.
          sizes: (B, S) float32, how many inputs each token is made of; read by the two options of merging.
        """
        drop = Dropout(self.dropout)
        norms = dict(epsilon=self.epsilon, dtype=self.dtype)
        bias = jnp.log(sizes)[:, None] if self.proportional_attention else None
        seen = None if mask is None else mask[:, None] > 0
        x, own = attention(x, num_heads=self.num_heads, drop=drop, mask=seen, bias=bias, **norms)
        shares = sizes if self.weighted_mean else None
        x, slots = token_merging.merge_by_keys(x, own.key, self.merge_r, self.class_token, shares)
        return LayerOutput(feed_forward(x, self.hidden or 4 * x.shape[-1], drop=drop, **norms), slots)


# The two halves of a layer. They are called in the compact method of a module, which gets their parameters.


def attention(
    x: jax.Array,
    source: jax.Array | None = None,
    *,
    num_heads: int,
    drop: Dropout,
    epsilon: float,
    dtype: DTypeLike,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    past: KeyValue | None = None,
    prefix: str = "",
) -> tuple[jax.Array, KeyValue]:
    """Returns LayerNorm(x + attention), (B, S, D), and the keys and values of `source`.

    Args:
      x: (B, S, D).
      source: (B, T, C), what x attends to; None: x itself.
      drop: on attention weights and on the residual branch.
      mask, bias: as in `attention.attend`.
      past: keys and values (B, P, N, H) that x attends to besides those of `source`. They come first.
      prefix: of the names of the parameters.
    """
    source = x if source is None else source
    heads = (num_heads, x.shape[-1] // num_heads)
    query = layers.split_heads(x.shape[-1], *heads, dtype=dtype, name=f"{prefix}query")(x)
    key = layers.split_heads(source.shape[-1], *heads, bias_grad=False, dtype=dtype, name=f"{prefix}key")(source)
    value = layers.split_heads(source.shape[-1], *heads, dtype=dtype, name=f"{prefix}value")(source)
    own = KeyValue(key, value)
    if past is not None:
        key, value = (jnp.concatenate(pair, 1) for pair in zip(past, own, strict=True))
    context = attend(query, key, value, mask=mask, bias=bias, dropout=drop)  # (B, S, N, H)
    out = layers.merge_heads(x.shape[-1], *heads, dtype=dtype, name=f"{prefix}attention_out")
    return layers.LayerNorm(epsilon, name=f"{prefix}attention_norm")(x + drop(out(context))), own


def feed_forward(
    x: jax.Array, hidden: int, *, drop: Dropout, epsilon: float, dtype: DTypeLike, prefix: str = ""
) -> jax.Array:
    """Returns LayerNorm(x + MLP) of x (B, S, D). `hidden` is the width inside the MLP, the rest as in `attention`."""
    x = x + drop(layers.Mlp(hidden, dtype=dtype, name=f"{prefix}mlp")(x))
    return layers.split_batch(layers.LayerNorm(epsilon, name=f"{prefix}mlp_norm")(x))
