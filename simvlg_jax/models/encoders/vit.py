"""The vision encoder: a pre-LayerNorm ViT whose residual stream after the last block is its output (EVA-CLIP, CLIP)."""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from simvlg_jax.models import layers
from simvlg_jax.models.attention import attend
from simvlg_jax.models.encoders.temporal_merge import TemporalMerge

CLIP_STYLE = dict(key_bias=True, quick_gelu=True, input_norm=True, patch_bias=False, norm_eps=1e-5)

# The published encoders lack their file's last block: SimVLG takes the penultimate layer.
VIT_SIZES = {
    "eva_g": dict(image_size=224, patch_size=14, width=1408, depth=39, num_heads=16, mlp_dim=6144),
    "clip_l": dict(image_size=224, patch_size=14, width=1024, depth=23, num_heads=16, mlp_dim=4096, **CLIP_STYLE),
    "small_64px": dict(image_size=64, patch_size=8, width=128, depth=6, num_heads=2, mlp_dim=512),
    "tiny_32px": dict(image_size=32, patch_size=8, width=32, depth=2, num_heads=2, mlp_dim=64),
}

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalize_images(images: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """uint8 (..., 3) in 0..255 -> `dtype`, with CLIP's channel means and deviations (both EVA and CLIP)."""
    scaled = images.astype(jnp.float32) / 255.0
    return ((scaled - jnp.array(CLIP_MEAN)) / jnp.array(CLIP_STD)).astype(dtype)


class Block(nn.Module):
    """x += attention(LN x); for video x += alpha temporal(x); x += mlp(LN x). Fields as in `ViT`."""

    num_heads: int
    mlp_dim: int
    key_bias: bool
    quick_gelu: bool
    norm_eps: float
    temporal: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:  # (B, N, D) or (B, F, N, D), the same
        shape, width = x.shape, x.shape[-1]
        x = x.reshape(-1, *shape[-2:])
        heads, dtype = (width, self.num_heads, width // self.num_heads), self.dtype
        y = layers.LayerNorm(self.norm_eps, name="norm1")(x)
        query = layers.split_heads(*heads, dtype=dtype, name="query")(y)
        key = layers.split_heads(*heads, use_bias=self.key_bias, bias_grad=False, dtype=dtype, name="key")(y)
        value = layers.split_heads(*heads, dtype=dtype, name="value")(y)
        context = attend(query, key, value)  # (B, S, N, H)
        x = x + layers.merge_heads(*heads, dtype=dtype, name="out")(context)
        if self.temporal:
            clips = x.reshape(shape)
            x = (clips + TemporalMerge(dtype=self.dtype, name="temporal_merge")(clips)).reshape(x.shape)
        y = layers.LayerNorm(self.norm_eps, name="norm2")(x)
        activation = layers.quick_gelu if self.quick_gelu else layers.gelu
        x = x + layers.Mlp(self.mlp_dim, activation, dtype=self.dtype, name="mlp")(y)
        return layers.split_batch(x.reshape(shape)), None


class ViT(nn.Module):
    """Patches and a class token through `depth` blocks; no final norm, every token returned.

    Attributes:
      image_size: side of the square picture, pixels.
      patch_size: side of a patch, pixels.
      width, depth, num_heads, mlp_dim: sizes, see `VIT_SIZES`.
      key_bias, patch_bias: whether the keys and the patch embedding have a bias (EVA: no, yes; CLIP: yes, no).
      quick_gelu: CLIP's activation instead of the exact GELU.
      input_norm: CLIP's LayerNorm before the first block.
      norm_eps: of every LayerNorm.
      temporal: video, see `TemporalMerge`: every block softly merges tokens across frames.
      max_frames: learned temporal positions, zero at first, for so many frames; 0 (published): none, and then a clip
        and its reverse are the same to the model.
      scan: the blocks as one scanned block with stacked parameters, else unrolled.
      remat: recompute each block's activations in the backward pass.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    key_bias: bool = False
    patch_bias: bool = True
    quick_gelu: bool = False
    input_norm: bool = False
    norm_eps: float = 1e-6
    temporal: bool = False
    max_frames: int = 0
    scan: bool = True
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + 1

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """images: (B, H, W, 3) normalised -> (B, 1 + (H/P)(W/P), D), the class token first.

        A temporal ViT takes clips: (B, F, H, W, 3) -> (B, F, 1 + (H/P)(W/P), D).
        """
        batch, side = images.shape[:-3], self.patch_size
        # A strided convolution as a matmul over patches.
        patches = einops.rearrange(images, "... (rows p) (columns q) c -> ... (rows columns) (p q c)", p=side, q=side)
        axes = ("patch", "embed")
        embed = layers.dense(
            3 * side**2, self.width, axes, use_bias=self.patch_bias, dtype=self.dtype, name="patch_embed"
        )
        x = embed(patches)  # (..., N - 1, D)
        init = layers.partitioned(layers.NORMAL_INIT, None, None, "embed")
        cls = self.param("cls", init, (1, 1, self.width))
        positions = self.param("position", init, (1, self.num_tokens, self.width))
        cls = jnp.broadcast_to(cls[0].astype(x.dtype), (*batch, 1, self.width))
        x = jnp.concatenate([cls, x], -2) + positions[0].astype(x.dtype)
        if self.max_frames:
            zero = layers.partitioned(nn.initializers.zeros, None, "embed")
            moments = self.param("temporal_position", zero, (self.max_frames, self.width))
            x = x + moments[: x.shape[1], None].astype(x.dtype)
        if self.input_norm:
            x = layers.LayerNorm(self.norm_eps, name="input_norm")(x)
        x = layers.split_batch(x)

        block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
        style = (self.num_heads, self.mlp_dim, self.key_bias, self.quick_gelu, self.norm_eps, self.temporal, self.dtype)
        if self.scan:
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.depth,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return stack(*style, name="blocks")(x, None)[0]
        for i in range(self.depth):
            x, _ = block(*style, name=f"blocks_{i}")(x)
        return x
