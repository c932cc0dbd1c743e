"""The OPT decoder."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from simvlg_jax.models import layers
from simvlg_jax.models.dropout import Dropout
from simvlg_jax.models.llms import language_model
from simvlg_jax.models.llms.language_model import Cache, LlmOutput
from simvlg_jax.models.packing import Packing

POSITION_OFFSET = 2  # rows of the position table that no real token uses
NORM_EPS = 1e-5

OPT_SIZES = {
    "opt_125m": dict(width=768, depth=12, num_heads=12, ffn=3072),
    "opt_350m": dict(width=1024, depth=24, num_heads=16, ffn=4096, embed_width=512, pre_norm=False),
    "opt_1.3b": dict(width=2048, depth=24, num_heads=32, ffn=8192),
    "opt_2.7b": dict(width=2560, depth=32, num_heads=32, ffn=10240),
    "opt_6.7b": dict(width=4096, depth=32, num_heads=32, ffn=16384),
    "opt_13b": dict(width=5120, depth=40, num_heads=40, ffn=20480),
    # The vocabulary of `data.text.character_tokenizer`.
    "opt_tiny": dict(width=32, depth=2, num_heads=4, ffn=64, vocab_size=98, max_positions=128),
}


class Block(nn.Module):
    """x += attention(LN x); x += fc2(relu(fc1(LN x))). Without `pre_norm`, LN follows each sum. Fields as in `Opt`."""

    num_heads: int
    ffn: int
    pre_norm: bool
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, jax.Array | None, jax.Array | None],  # x (B, S, D), cached key, value (L, B, T, N, H)
        layer: jax.Array,  # () int32, this layer's number
        visible: jax.Array | Packing,  # which keys a query sees: (B, S, T) bool; the packing of packed x (G, T, D)
        index: jax.Array | None,  # () int32, the first slot of the cache to write
    ) -> tuple[tuple[jax.Array, jax.Array | None, jax.Array | None], None]:
        x, key_cache, value_cache = carry
        width = x.shape[-1]
        heads, dtype = (width, self.num_heads, width // self.num_heads), self.dtype
        drop = Dropout(self.dropout)
        attention_norm = layers.LayerNorm(NORM_EPS, name="attention_norm")
        mlp_norm = layers.LayerNorm(NORM_EPS, name="mlp_norm")

        y = attention_norm(x) if self.pre_norm else x
        query = layers.split_heads(*heads, dtype=dtype, name="query")(y)
        key = layers.split_heads(*heads, bias_grad=False, dtype=dtype, name="key")(y)
        value = layers.split_heads(*heads, dtype=dtype, name="value")(y)
        if key_cache is not None:
            key_cache, key = language_model.write_layer(key_cache, key, layer, index)
            value_cache, value = language_model.write_layer(value_cache, value, layer, index)
        context = language_model.attend_visible(query, key, value, visible)  # (B, S, N, H)
        x = x + drop(layers.merge_heads(*heads, dtype=dtype, name="out")(context))
        x = x if self.pre_norm else attention_norm(x)

        y = mlp_norm(x) if self.pre_norm else x
        x = x + drop(layers.Mlp(self.ffn, nn.relu, dtype=self.dtype, name="mlp")(y))
        x = layers.split_batch(x if self.pre_norm else mlp_norm(x))
        return (x, key_cache, value_cache), None


class Opt(nn.Module):
    """Maps embeddings to hidden states. The caller uses `embed` before it and `logits` after it.

    The output matrix is the embedding. Positions are learned; their table has POSITION_OFFSET more rows.

    Attributes:
      width, depth, num_heads, ffn: sizes, see `OPT_SIZES`.
      vocab_size: rows of the embedding.
      max_positions: the largest number of tokens.
      embed_width: width of the token embeddings; None for `width`. OPT-350m alone has another, and projects embeddings
        in and states out. A soft prompt is not projected in.
      pre_norm: whether LayerNorm comes before attention and MLP, and after the last block. OPT-350m has it after
        attention and MLP instead.
      dropout: rate on both residual branches while an rng named "dropout" is given. The published training left OPT's
        0.1 on in the frozen model.
      scan, remat, dtype: see `llama.Llama`.
    """

    width: int
    depth: int
    num_heads: int
    ffn: int
    vocab_size: int = 50272
    max_positions: int = 2048
    embed_width: int | None = None
    pre_norm: bool = True
    dropout: float = 0.0
    scan: bool = True
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @property
    def _projects(self) -> bool:
        return self.embed_width not in (None, self.width)

    def setup(self) -> None:
        table_init = layers.matrix(layers.NORMAL_INIT, "vocab", "embed", summed=(-1,))
        self.embedding = self.param("embedding", table_init, (self.vocab_size, self.embed_width or self.width))
        rows = self.max_positions + POSITION_OFFSET
        position_init = layers.partitioned(layers.NORMAL_INIT, None, "embed")
        self.position = self.param("position", position_init, (rows, self.width))
        fields = (self.num_heads, self.ffn, self.pre_norm, self.dropout, self.dtype)
        self.blocks = language_model.make_blocks(Block, fields, self.depth, self.scan, self.remat, shared=0)
        if self.pre_norm:
            self.norm = layers.LayerNorm(NORM_EPS)
        if self._projects:
            plain = dict(use_bias=False, dtype=self.dtype)
            self.project_in = layers.dense(self.embed_width, self.width, (None, "embed"), **plain)
            self.project_out = layers.dense(self.width, self.embed_width, ("embed", None), **plain)

    def embed(self, ids: jax.Array) -> jax.Array:
        """Returns the embeddings (B, S, D) of ids (B, S) int32, without positions."""
        x = layers.lookup(self.embedding, ids, self.dtype)
        return self.project_in(x) if self._projects else x

    def __call__(
        self,
        embeddings: jax.Array,
        mask: jax.Array | Packing,
        positions: jax.Array,
        cache: Cache | None = None,
    ) -> LlmOutput:
        """Runs the blocks. Arguments as for `llama.Llama`; positions (B, S) int32 count from 0."""
        x = embeddings.astype(self.dtype)
        x = x + jnp.take(self.position, positions + POSITION_OFFSET, axis=0).astype(self.dtype)
        x, cache = language_model.run_blocks(self.blocks, self.depth, x, mask, cache)
        return LlmOutput(self.norm(x) if self.pre_norm else x, cache)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns the logits (B, S, V) float32 of hidden states (B, S, D)."""
        if self._projects:
            hidden = self.project_out(hidden)
        return layers.linear("BSD,VD->BSV", hidden, self.embedding, self.dtype, preferred_element_type=jnp.float32)

    @nn.nowrap
    def init_cache(self, batch: int, max_length: int) -> Cache:
        """Returns an empty cache for `batch` rows of up to `max_length` tokens. It needs no parameters."""
        head_dim = self.width // self.num_heads
        return language_model.empty_cache(self.depth, batch, max_length, self.num_heads, head_dim, self.dtype)
