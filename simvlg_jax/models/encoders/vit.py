"""The vision encoder: a ViT with LayerNorm before attention and MLP, and none after the last block.

The defaults of `ViT` are EVA-CLIP's. Other published encoders are subclasses with other defaults, see `clip.Clip` and
`siglip.Siglip`. Except for weights, the rest of the program depends on these fields and not on the class.
"""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from simvlg_jax.models import layers
from simvlg_jax.models.attention import attend
from simvlg_jax.models.encoders.temporal_merge import TemporalMerge

# A depth is one less than in the published file, since SimVLG takes the penultimate layer.
VIT_SIZES = {
    "eva_g": dict(image_size=224, patch_size=14, width=1408, depth=39, num_heads=16, mlp_dim=6144),
    "small_64px": dict(image_size=64, patch_size=8, width=128, depth=6, num_heads=2, mlp_dim=512),
    "tiny_32px": dict(image_size=32, patch_size=8, width=32, depth=2, num_heads=2, mlp_dim=64),
}

ACTIVATIONS = {"gelu": layers.gelu, "quick_gelu": layers.quick_gelu, "tanh_gelu": nn.gelu}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Block(nn.Module):
    """x += attention(LN x); x += alpha temporal(x), for video alone; x += mlp(LN x). Fields as in `ViT`."""

    num_heads: int
    mlp_dim: int
    key_bias: bool
    activation: str
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
        x = x + layers.Mlp(self.mlp_dim, ACTIVATIONS[self.activation], dtype=self.dtype, name="mlp")(y)
        return layers.split_batch(x.reshape(shape)), None


class ViT(nn.Module):
    """Runs patches, and a class token if there is one, through `depth` blocks; returns every token, without a norm.

    Attributes:
      image_size: side of the square picture, pixels. Pixels beyond the last whole patch are cut off.
      patch_size: side of a patch, pixels.
      width, depth, num_heads, mlp_dim: sizes, see `VIT_SIZES`.
      class_token: whether a learned token comes before the patches. It is never merged.
      key_bias, patch_bias: whether the keys and the patch embedding have a bias.
      activation: of the MLPs, a key of `ACTIVATIONS`.
      input_norm: whether there is a LayerNorm before the first block.
      norm_eps: of every LayerNorm.
      image_mean, image_std: mean and standard deviation of each colour in 0..1, for normalising pictures.
      temporal: whether every block merges tokens across frames, for video; see `TemporalMerge`.
      max_frames: number of frames that have learned temporal positions, zero at first. With 0 (published) there are no
        positions, and the model cannot distinguish a clip from its reverse.
      scan: whether the blocks are one scanned block with stacked parameters; otherwise they are unrolled.
      remat: whether the backward pass recomputes each block's activations.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    class_token: bool = True
    key_bias: bool = False
    patch_bias: bool = True
    activation: str = "gelu"
    input_norm: bool = False
    norm_eps: float = 1e-6
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    temporal: bool = False
    max_frames: int = 0
    scan: bool = True
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + self.class_token

    @nn.nowrap
    def normalize(self, images: jax.Array) -> jax.Array:
        """Normalises uint8 pictures (..., 3) in 0..255 for `__call__`; returns the compute dtype."""
        scaled = images.astype(jnp.float32) / 255.0
        return ((scaled - jnp.array(self.image_mean)) / jnp.array(self.image_std)).astype(self.dtype)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns the tokens (B, N, D) of normalised images (B, H, W, 3), N = `num_tokens`, a class token first.

        A temporal ViT maps clips (B, F, H, W, 3) to (B, F, N, D).
        """
        batch, side = images.shape[:-3], self.patch_size
        height, width = (size // side * side for size in images.shape[-3:-1])
        images = images[..., :height, :width, :]
        # A matmul over patches equals the published strided convolution.
        patches = einops.rearrange(images, "... (rows p) (columns q) c -> ... (rows columns) (p q c)", p=side, q=side)
        axes = ("patch", "embed")
        embed = layers.dense(
            3 * side**2, self.width, axes, use_bias=self.patch_bias, dtype=self.dtype, name="patch_embed"
        )
        x = embed(patches)  # (..., patches, D)
        init = layers.partitioned(layers.NORMAL_INIT, None, None, "embed")
        if self.class_token:
            cls = self.param("cls", init, (1, 1, self.width))
            x = jnp.concatenate([jnp.broadcast_to(cls[0].astype(x.dtype), (*batch, 1, self.width)), x], -2)
        x = x + self.param("position", init, (1, self.num_tokens, self.width))[0].astype(x.dtype)
        if self.max_frames:
            zero = layers.partitioned(nn.initializers.zeros, None, "embed")
            moments = self.param("temporal_position", zero, (self.max_frames, self.width))
            x = x + moments[: x.shape[1], None].astype(x.dtype)
        if self.input_norm:
            x = layers.LayerNorm(self.norm_eps, name="input_norm")(x)
        x = layers.split_batch(x)

        block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
        style = (self.num_heads, self.mlp_dim, self.key_bias, self.activation, self.norm_eps, self.temporal, self.dtype)
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
