"""The Q-Former: learned queries that read the visual tokens through a BERT (BLIP-2, arXiv 2301.12597, section 3.1)."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from simvlg_jax.models import bert, layers, token_merging
from simvlg_jax.models.bert import KeyValue
from simvlg_jax.models.connectors.connector import ConnectorOutput
from simvlg_jax.models.dropout import Dropout
from simvlg_jax.models.encoders.frames import VisualTokens


@struct.dataclass
class QFormerStates:
    """What `QFormer.read` returns.

    Attributes:
      tokens: (B, Q + L, D), the queries, then the text.
      keys: of each layer the keys and values of its self-attention, (B, Q + L, N, H).
    """

    tokens: jax.Array
    keys: tuple[KeyValue, ...]


class QFormerLayer(nn.Module):
    """Self-attention over queries and text, cross-attention of the queries, then an MLP for each of the two.

    Self-attention and the text's MLP are a `bert.BertLayer`. A layer through which no text goes has no MLP for it.

    Attributes:
      hidden: width inside the MLPs.
      cross: whether the queries attend to visual tokens.
    """

    num_heads: int
    hidden: int
    cross: bool
    dropout: float
    epsilon: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        queries: int,
        visual: jax.Array | None,
        sizes: jax.Array | None,
        mask: jax.Array | None,
        past: KeyValue | None,
    ) -> tuple[jax.Array, KeyValue]:
        """Applies the layer to x (B, Q + L, D), whose first `queries` tokens are queries; see `QFormer.read`."""
        drop = Dropout(self.dropout)
        norms = dict(drop=drop, epsilon=self.epsilon, dtype=self.dtype)
        x, keys = bert.attention(x, num_heads=self.num_heads, mask=mask, past=past, **norms)
        asking, text = x[:, :queries], x[:, queries:]
        if queries and self.cross:
            bias = None if sizes is None else jnp.log(sizes)[:, None]
            asking, _ = bert.attention(asking, visual, num_heads=self.num_heads, bias=bias, prefix="cross_", **norms)
        parts = []
        if queries:
            parts.append(bert.feed_forward(asking, self.hidden, prefix="query_", **norms))
        if text.shape[1]:
            parts.append(bert.feed_forward(text, self.hidden, **norms))
        return jnp.concatenate(parts, 1), keys


class QFormer(nn.Module):
    """Learned queries go through a BERT and attend to the visual tokens in every second layer.

    The queries have no positions. A captioner needs the queries alone (`__call__`). The first stage of BLIP-2 also
    sends texts through the same layers (`read`), whose embeddings are not part of this module.

    Attributes:
      width, depth, num_heads: sizes, see `bert.BERT_SIZES`.
      queries: Q, number of learned queries, which is the number of tokens that come out.
      cross_every: every so many layers, from the first on, have cross-attention.
      dropout: rate at BERT's usual places.
      hidden: width inside the MLPs; None for 4 times `width`.
      remat: whether the backward pass recomputes each layer's activations.
    """

    width: int
    depth: int
    num_heads: int
    queries: int = 32
    cross_every: int = 2
    dropout: float = 0.1
    hidden: int | None = None
    epsilon: float = 1e-12
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    merges, class_token = (), False  # no layer merges, and no class token comes out

    def setup(self) -> None:
        init = layers.partitioned(layers.NORMAL_INIT, None, None, "embed")
        self.query_tokens = self.param("query_tokens", init, (1, self.queries, self.width))
        self.norm = layers.LayerNorm(self.epsilon)
        self.drop = Dropout(self.dropout)
        layer = nn.remat(QFormerLayer, static_argnums=2) if self.remat else QFormerLayer
        self.layer = [
            layer(
                self.num_heads,
                self.hidden or 4 * self.width,
                i % self.cross_every == 0,
                self.dropout,
                self.epsilon,
                self.dtype,
            )
            for i in range(self.depth)
        ]

    def __call__(self, visual: jax.Array, source_map: jax.Array | None = None) -> ConnectorOutput:
        """Returns the queries after the last layer, see `Connector`.

        Visual tokens that the vision encoder has merged draw as much attention as all their patches.
        """
        sizes = None if source_map is None else token_merging.slot_sizes(source_map, visual.shape[1])
        return ConnectorOutput(self.read(visual, sizes=sizes).tokens)

    def read(
        self,
        visual: jax.Array | None = None,
        text: jax.Array | None = None,
        *,
        sizes: jax.Array | None = None,
        mask: jax.Array | None = None,
        past: tuple[KeyValue, ...] | None = None,
    ) -> QFormerStates:
        """Sends queries, a text, or both through all layers.

        Args:
          visual: (B, T, C), visual tokens; None: there are no queries, and the text sees no picture.
          text: (B, L, D), embeddings of a text before the LayerNorm; None: there is no text.
          sizes: (B, T) float32, how many patches each visual token is made of; None: one each.
          mask: bool, broadcast to (B, S, K): which of K keys each of S positions sees; queries come first, then
            text. None: all of them.
          past: the `keys` of an earlier call. All positions can see them, before their own.
        """
        parts = []
        if visual is not None:
            parts.append(jnp.broadcast_to(self.query_tokens, (len(visual), self.queries, self.width)))
        if text is not None:
            parts.append(text)
        x = self.drop(self.norm(jnp.concatenate(parts, 1).astype(self.dtype)))  # (B, S, D)
        x = layers.split_batch(x)
        queries, keys = 0 if visual is None else self.queries, []
        for i, layer in enumerate(self.layer):
            x, own = layer(x, queries, visual, sizes, mask, None if past is None else past[i])
            keys.append(own)
        return QFormerStates(x, tuple(keys))


def build_qformer(connector: Mapping, seen: VisualTokens, dtype: DTypeLike) -> QFormer:
    """Returns the Q-Former of a config's `connector`. Raises ValueError for an unknown size."""
    return QFormer(
        **bert.size_of(connector),
        queries=connector.queries,
        dropout=connector.dropout,
        remat=connector.remat,
        dtype=dtype,
    )
