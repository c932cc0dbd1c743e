"""The LLaMA decoder: LLaMA, TinyLlama, SmolLM2, and the base of Vicuna and Qwen."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from simvlg_jax.models import layers
from simvlg_jax.models.llms import language_model
from simvlg_jax.models.llms.language_model import Cache, LlmOutput
from simvlg_jax.models.packing import Packing


class RopeScaling(NamedTuple):
    """How Llama 3 scales the rotary frequencies for contexts longer than those of its first training.

    Wavelengths above original_length / low become `factor` times as long. Those below original_length / high are kept.
    Between the two limits, both frequencies are blended.
    """

    factor: float
    low: float
    high: float
    original_length: int


LLAMA3_8B = dict(
    width=4096,
    depth=32,
    num_heads=32,
    num_kv_heads=8,
    ffn=14336,
    vocab_size=128256,
    rope_theta=500000.0,
    norm_eps=1e-5,
)
LLAMA_SIZES = {
    "smollm2_135m": dict(
        width=576,
        depth=30,
        num_heads=9,
        num_kv_heads=3,
        ffn=1536,
        vocab_size=49152,
        rope_theta=100000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
    ),
    "tinyllama_1.1b": dict(
        width=2048, depth=22, num_heads=32, num_kv_heads=4, ffn=5632, vocab_size=32000, norm_eps=1e-5
    ),
    "llama2_7b": dict(width=4096, depth=32, num_heads=32, num_kv_heads=32, ffn=11008, vocab_size=32000, norm_eps=1e-5),
    "llama3_8b": LLAMA3_8B,
    "llama3.1_8b": LLAMA3_8B | dict(rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192)),
    "llama3.2_1b": dict(
        width=2048,
        depth=16,
        num_heads=32,
        num_kv_heads=8,
        ffn=8192,
        vocab_size=128256,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
        norm_eps=1e-5,
        tie_embeddings=True,
    ),
    # The vocabulary of `data.text.character_tokenizer`.
    "tiny": dict(width=32, depth=2, num_heads=4, num_kv_heads=2, ffn=64, vocab_size=98, tie_embeddings=True),
}


@functools.partial(nn.remat, prevent_cse=False)  # keeps x in its own dtype instead of float32 arrays
class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, in float32: (..., D) -> (..., D) in the input's dtype."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", layers.partitioned(nn.initializers.ones, "norm"), x.shape[-1:])
        wide = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(wide), -1, keepdims=True)
        return (wide * jax.lax.rsqrt(variance + self.epsilon) * scale).astype(x.dtype)


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Returns by how many radians each position turns each pair of a head: (H / 2,) float32."""
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if scaling:
        turns = scaling.original_length * frequencies / (2 * np.pi)  # over the original context
        kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
        frequencies = kept * frequencies + (1 - kept) * frequencies / scaling.factor
    return frequencies.astype(np.float32)


def rotary_angles(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Returns cosine and sine (B, S, 1, H / 2), float32, for positions (B, S)."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Applies the rotary embedding to x (B, S, N, H), in float32. Pairs are (i, i + H / 2), as in Hugging Face."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, -1).astype(x.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Returns silu(gate) * up, of (B, S, F) each, and keeps only these two for the backward pass."""
    return nn.silu(gate) * up


class Block(nn.Module):
    """x += attention(RMSNorm x); x += gated MLP(RMSNorm x). Fields as in `Llama`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn: int
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, jax.Array | None, jax.Array | None],  # x (B, S, D), cached key, value (L, B, T, K, H)
        layer: jax.Array,  # () int32, this layer's number
        visible: jax.Array | Packing,  # which keys a query sees: (B, S, T) bool; the packing of packed x (G, T, D)
        index: jax.Array | None,  # () int32, the first slot of the cache to write
        rotary: tuple[jax.Array, jax.Array],  # cos, sin (B, S, 1, H / 2)
    ) -> tuple[tuple[jax.Array, jax.Array | None, jax.Array | None], None]:
        x, key_cache, value_cache = carry
        width, heads, kv_heads, head_dim = x.shape[-1], self.num_heads, self.num_kv_heads, self.head_dim
        plain = dict(use_bias=False, dtype=self.dtype)
        # The rotation makes a key's bias depend on the key's position, so unlike in other models it has a gradient.
        split = dict(use_bias=self.qkv_bias, dtype=self.dtype)

        y = RMSNorm(self.norm_eps, name="attention_norm")(x)
        query = layers.split_heads(width, heads, head_dim, **split, name="query")(y)
        key = layers.split_heads(width, kv_heads, head_dim, "kv_heads", **split, name="key")(y)
        value = layers.split_heads(width, kv_heads, head_dim, "kv_heads", **split, name="value")(y)
        if self.qk_norm:
            query, key = RMSNorm(self.norm_eps, name="query_norm")(query), RMSNorm(self.norm_eps, name="key_norm")(key)
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        if key_cache is not None:
            key_cache, key = language_model.write_layer(key_cache, key, layer, index)
            value_cache, value = language_model.write_layer(value_cache, value, layer, index)
        context = language_model.attend_visible(query, key, value, visible)  # (B, S, N, H)
        x = x + layers.merge_heads(width, heads, head_dim, **plain, name="out")(context)

        y = RMSNorm(self.norm_eps, name="mlp_norm")(x)
        gate = layers.dense(width, self.ffn, ("embed", "mlp"), **plain, name="gate")(y)
        up = layers.dense(width, self.ffn, ("embed", "mlp"), **plain, name="up")(y)
        down = layers.dense(self.ffn, width, ("mlp", "embed"), **plain, name="down")
        x = layers.split_batch(x + down(gated(gate, up)))
        return (x, key_cache, value_cache), None


class Llama(nn.Module):
    """Maps embeddings to hidden states. The caller uses `embed` before it and `logits` after it.

    Attributes:
      width, depth, num_heads, ffn: sizes, see `LLAMA_SIZES`.
      num_kv_heads: key and value heads, each shared by num_heads / num_kv_heads query heads.
      vocab_size: rows of the embedding.
      rope_theta: base of the rotary frequencies.
      rope_scaling: see `RopeScaling`.
      norm_eps: of RMSNorm.
      tie_embeddings: whether the output matrix is the embedding.
      head_dim: width of a head; width / num_heads when None.
      qkv_bias: whether query, key and value have a bias.
      qk_norm: whether RMSNorm is applied to each head of query and key, before the rotation.
      scan: whether the blocks are one scanned block with stacked parameters ("blocks"); otherwise they are unrolled
        ("blocks_0", ...).
      remat: whether the backward pass recomputes each block's activations.
      dtype: compute dtype; norms and softmax are always float32.
    """

    width: int
    depth: int
    num_heads: int
    num_kv_heads: int
    ffn: int
    vocab_size: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    head_dim: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    scan: bool = True
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @property
    def _head_dim(self) -> int:
        return self.head_dim or self.width // self.num_heads

    @property
    def rotary_frequencies(self) -> np.ndarray:
        return rotary_frequencies(self._head_dim, self.rope_theta, self.rope_scaling)

    def setup(self) -> None:
        embedding_init = layers.matrix(layers.NORMAL_INIT, "vocab", "embed", summed=(-1,))
        self.embedding = self.param("embedding", embedding_init, (self.vocab_size, self.width))
        sizes = (self.num_heads, self.num_kv_heads, self._head_dim, self.ffn)
        fields = (*sizes, self.norm_eps, self.qkv_bias, self.qk_norm, self.dtype)
        self.blocks = language_model.make_blocks(Block, fields, self.depth, self.scan, self.remat, shared=1)
        self.norm = RMSNorm(self.norm_eps)
        if not self.tie_embeddings:
            head_init = layers.matrix(layers.NORMAL_INIT, "embed", "vocab", summed=(-2,))
            self.lm_head = self.param("lm_head", head_init, (self.width, self.vocab_size))

    def embed(self, ids: jax.Array) -> jax.Array:
        """Returns the embeddings (B, S, D) of ids (B, S) int32."""
        return layers.lookup(self.embedding, ids, self.dtype)

    def __call__(
        self,
        embeddings: jax.Array,
        mask: jax.Array | Packing,
        positions: jax.Array,
        cache: Cache | None = None,
    ) -> LlmOutput:
        """Runs the blocks. Token i sees the real tokens up to i and those in the cache.

        Args:
          embeddings: (B, S, D).
          mask: (B, S), 1 for real tokens; of packed embeddings (G, T, D), with positions (G, T), their `Packing`.
          positions: (B, S) int32, for the rotary embedding.
          cache: from `init_cache` or from an earlier call; the S tokens are added to it.
        """
        rotary = rotary_angles(positions, self.rotary_frequencies)
        x = embeddings.astype(self.dtype)
        x, cache = language_model.run_blocks(self.blocks, self.depth, x, mask, cache, rotary)
        return LlmOutput(self.norm(x), cache)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns the logits (B, S, V) float32 of hidden states (B, S, D)."""
        equation, kernel = ("BSD,VD->BSV", self.embedding) if self.tie_embeddings else ("BSD,DV->BSV", self.lm_head)
        return layers.linear(equation, hidden, kernel, self.dtype, preferred_element_type=jnp.float32)

    @nn.nowrap
    def init_cache(self, batch: int, max_length: int) -> Cache:
        """Returns an empty cache for `batch` rows of up to `max_length` tokens. It needs no parameters."""
        return language_model.empty_cache(self.depth, batch, max_length, self.num_kv_heads, self._head_dim, self.dtype)
