"""The TomeFormer: a BERT encoder over visual tokens that merges similar ones in every layer (SimVLG, 3.2)."""

import itertools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from simvlg_jax.models import bert, layers, token_merging
from simvlg_jax.models.connectors.connector import ConnectorOutput
from simvlg_jax.models.encoders.frames import VisualTokens


class TomeFormer(nn.Module):
    """A linear map (published as VL_proj), then BERT layers over visual tokens.

    The layers are not scanned, since each has another number of tokens. There is no attention mask, since all inputs
    are visual tokens. They take rows 0..N-1 of BERT's position table and token type 0, as published; so do the
    patches of each frame of a clip. Tokens that the
    vision encoder, or time, has merged take the mean row of their patches.

    Attributes:
      width, depth, num_heads: sizes, see `bert.BERT_SIZES`.
      merges: tokens to remove in each layer, from `token_merging.merge_schedule`.
      class_token: whether the first visual token is a class token. A class token is never merged.
      dropout: rate at BERT's usual places.
      remat: whether the backward pass recomputes each layer's activations.
      weighted_mean, proportional_attention: what ToMe does with the sizes of tokens and SimVLG does not; see
        `bert.BertLayer`.
      places: P, the patches of a frame, if the tokens are patches of several frames; else 0.
    """

    width: int
    depth: int
    num_heads: int
    merges: tuple[int, ...]
    class_token: bool = True
    dropout: float = 0.1
    remat: bool = False
    weighted_mean: bool = False
    proportional_attention: bool = False
    places: int = 0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, visual: jax.Array, source_map: jax.Array | None = None) -> ConnectorOutput:
        """Returns the output, see `Connector`. A picture has 512 patches at most. A class token stays first."""
        axes = ("mlp", "embed")
        x = layers.torch_dense(visual.shape[-1], self.width, axes, dtype=self.dtype, name="vl_proj")(visual)
        rows = self._rows(x.shape[1] if source_map is None else source_map.shape[1]) if self.places else None
        x = bert.BertEmbeddings(dropout=self.dropout, name="embeddings")(x, source_map, rows)
        if source_map is None:
            source_map = token_merging.unmerged(x)
        maps = []
        block = nn.remat(bert.BertLayer) if self.remat else bert.BertLayer
        for i, r in enumerate(self.merges):
            layer = block(
                self.num_heads,
                r,
                self.class_token,
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
            maps.append(source_map)
        return ConnectorOutput(x, source_map, tuple(maps))

    def _rows(self, count: int) -> np.ndarray:
        """Returns the row of BERT's table of each of so many patches of a clip, and of its class token: (N,)."""
        first = int(self.class_token)
        return np.concatenate([np.arange(first), first + np.arange(count - first) % self.places])


def build_tomeformer(connector: Mapping, seen: VisualTokens, dtype: DTypeLike) -> TomeFormer:
    """Returns the TomeFormer of a config's `connector` for the tokens of a vision encoder.

    Raises:
      ValueError: an unknown size, a schedule that does not fit, or more tokens than BERT has positions.
    """
    needed = seen.class_token + seen.places if seen.places else seen.num_tokens
    if needed > bert.MAX_POSITIONS:
        raise ValueError(f"a BERT takes {bert.MAX_POSITIONS} tokens at most, and the vision encoder gives {needed}")
    size = bert.size_of(connector)
    merges = token_merging.schedule_of(connector, "connector", size["depth"], seen.num_tokens, seen.class_token)
    if seen.num_output_tokens < seen.num_tokens:
        # Every layer leaves as many tokens as without that merging, if it gets so many: the language model was trained
        # with this number, and with the order of tokens that the last merges make.
        counts = token_merging.token_counts(seen.num_tokens, merges, seen.class_token)
        counts = [min(count, seen.num_output_tokens) for count in counts]
        merges = tuple(before - after for before, after in itertools.pairwise(counts))
    return TomeFormer(
        **size,
        merges=merges,
        class_token=seen.class_token,
        dropout=connector.dropout,
        remat=connector.remat,
        weighted_mean=connector.weighted_mean,
        proportional_attention=connector.proportional_attention,
        places=seen.places,
        dtype=dtype,
    )
