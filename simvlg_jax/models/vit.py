"""The vision encoder: a pre-LayerNorm ViT whose residual stream after the last block is its output (EVA-CLIP)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from simvlg_jax.models import layers

VIT_SIZES = {
    "eva_g": dict(image_size=224, patch_size=14, width=1408, depth=39, num_heads=16, mlp_dim=6144),
    "small_64px": dict(image_size=64, patch_size=8, width=128, depth=6, num_heads=2, mlp_dim=512),
    "tiny_32px": dict(image_size=32, patch_size=8, width=32, depth=2, num_heads=2, mlp_dim=64),
}

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalize_images(images: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """uint8 (B, H, W, 3) in 0..255 -> `dtype`, with CLIP's channel means and deviations (both EVA and CLIP)."""
    scaled = images.astype(jnp.float32) / 255.0
    return ((scaled - jnp.array(CLIP_MEAN)) / jnp.array(CLIP_STD)).astype(dtype)


class Block(nn.Module):
    """x += attention(LN x); x += mlp(LN x). Keys have no bias, as in EVA."""

    num_heads: int
    mlp_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:  # (B, N, D) -> (B, N, D)
        width = x.shape[-1]
        heads = {"num_heads": self.num_heads, "head_dim": width // self.num_heads, "dtype": self.dtype}
        y = layers.LayerNorm(1e-6, name="norm1")(x)
        query = layers.Projection(**heads, name="query")(y)
        key = layers.Projection(**heads, use_bias=False, name="key")(y)
        value = layers.Projection(**heads, name="value")(y)
        context = layers.weighted_values(layers.attention_weights(query, key), value)  # (B, N, H, K)
        x = x + layers.MergeHeads(width, dtype=self.dtype, name="out")(context)
        y = layers.LayerNorm(1e-6, name="norm2")(x)
        return x + layers.Mlp(self.mlp_dim, dtype=self.dtype, name="mlp")(y), None


class ViT(nn.Module):
    """Patches and a class token through `depth` blocks; no final norm, every token returned.

    Attributes:
      image_size: side of the square picture, pixels.
      patch_size: side of a patch, pixels.
      width, depth, num_heads, mlp_dim: sizes, see `VIT_SIZES`.
      scan: the blocks as one scanned block with stacked parameters, else unrolled.
      remat: recompute each block's activations in the backward pass.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    scan: bool = True
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + 1

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """images: (B, H, W, 3) normalised -> (B, 1 + (H/P)(W/P), D), the class token first."""
        batch, height, width, _ = images.shape
        size = self.patch_size
        # A strided convolution as a matmul over patches flattened (row, column, channel).
        patches = images.reshape(batch, height // size, size, width // size, size, 3)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size * size * 3)
        embed = layers.Linear(
            self.width,
            ("patch", "embed"),
            layers.BERT_INIT,
            nn.initializers.zeros,
            self.dtype,
            name="patch_embed",
        )
        x = embed(patches)  # (B, N - 1, D)
        init = layers.partitioned(layers.BERT_INIT, None, None, "embed")
        cls = self.param("cls", init, (1, 1, self.width))
        positions = self.param("position", init, (1, self.num_tokens, self.width))
        x = jnp.concatenate([jnp.broadcast_to(cls.astype(x.dtype), (batch, 1, self.width)), x], 1)
        x = x + positions.astype(x.dtype)

        block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
        if self.scan:
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.depth,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return stack(self.num_heads, self.mlp_dim, self.dtype, name="blocks")(x, None)[0]
        for i in range(self.depth):
            x, _ = block(self.num_heads, self.mlp_dim, self.dtype, name=f"blocks_{i}")(x)
        return x
