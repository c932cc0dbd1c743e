"""The vision encoder: a ViT with LayerNorm before attention and MLP, and none after the last block.

The defaults of `ViT` are EVA-CLIP's. Other published encoders are subclasses with other defaults, see `clip.Clip` and
`siglip.Siglip`. Except for weights, the rest of the program depends on these fields and not on the class.
"""

import functools
from collections.abc import Callable

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from simvlg_jax.models import layers, token_merging
from simvlg_jax.models.encoders.block import Block

# A depth is one less than in the published file, since SimVLG takes the penultimate layer.
VIT_SIZES = {
    "eva_g": dict(image_size=224, patch_size=14, width=1408, depth=39, num_heads=16, mlp_dim=6144),
    "small_64px": dict(image_size=64, patch_size=8, width=128, depth=6, num_heads=2, mlp_dim=512),
    "tiny_32px": dict(image_size=32, patch_size=8, width=32, depth=2, num_heads=2, mlp_dim=64),
}

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@struct.dataclass
class VisionOutput:
    """What `ViT.encode` returns.

    Attributes:
      tokens: (B, T, D), T = `ViT.num_output_tokens`; of clips (B, F, T, D). A class token is the first.
      source_map: (B, N) int32, N = `ViT.num_tokens`: which token each patch, and the class token, became part of. None
        if the ViT merges nothing.
    """

    tokens: jax.Array
    source_map: jax.Array | None = None


class ViT(nn.Module):
    """Runs patches, and a class token if there is one, through `depth` blocks; returns every token, without a norm.

    Attributes:
      image_size: side of the square picture, pixels. Pixels beyond the last whole patch are cut off.
      patch_size: side of a patch, pixels.
      width, depth, num_heads, mlp_dim: sizes, see `VIT_SIZES`.
      class_token: whether a learned token comes before the patches. It is never merged.
      key_bias, patch_bias: whether the keys and the patch embedding have a bias.
      activation: of the MLPs, a key of `block.ACTIVATIONS`.
      input_norm: whether there is a LayerNorm before the first block.
      norm_eps: of every LayerNorm.
      image_mean, image_std: mean and standard deviation of each colour in 0..1, for normalising pictures.
      temporal: whether every block merges tokens across frames, for video; see `TemporalMerge`.
      max_frames: number of frames that have learned temporal positions, zero at first. With 0 (published) there are no
        positions, and the model cannot distinguish a clip from its reverse.
      merges: number of tokens that each block merges away, from `token_merging.schedule_of`; () for none. A ViT with
        temporal merging merges none.
      scan: whether the parameters of the blocks are stacked, and the blocks one scanned block; otherwise they are
        unrolled. Blocks that merge have different numbers of tokens, so they are always unrolled.
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
    merges: tuple[int, ...] = ()
    scan: bool = True
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + self.class_token

    @property
    def num_output_tokens(self) -> int:
        """What merging leaves of `num_tokens`."""
        return token_merging.token_counts(self.num_tokens, self.merges, self.class_token)[-1]

    @nn.nowrap
    def normalize(self, images: jax.Array) -> jax.Array:
        """Normalises uint8 pictures (..., 3) in 0..255 for `__call__`; returns the compute dtype."""
        scaled = images.astype(jnp.float32) / 255.0
        return ((scaled - jnp.array(self.image_mean)) / jnp.array(self.image_std)).astype(self.dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns the tokens of `encode`."""
        return self.encode(images).tokens

    @nn.compact
    def encode(self, images: jax.Array) -> VisionOutput:
        """Returns the tokens of normalised images (B, H, W, 3), or of clips (B, F, H, W, 3)."""
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

        merging = any(self.merges)
        names = ("num_heads", "mlp_dim", "key_bias", "activation", "norm_eps", "temporal", "class_token", "dtype")
        fields = {name: getattr(self, name) for name in names}
        block = nn.remat(Block, prevent_cse=merging or not self.scan) if self.remat else Block
        merges = self.merges or (0,) * self.depth
        if self.scan:
            stack = nn.scan(
                block,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True},
                length=self.depth,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(**fields, name="blocks")
            if not merging:
                return VisionOutput(stack(x, None)[0])
            if self.is_initializing():
                stack(x, None)  # makes the stacked parameters
            stacked = nn.unbox(stack.variables["params"])
            blocks = [_nth(block(**fields, merge_r=r, parent=None), stacked, i) for i, r in enumerate(merges)]
        else:
            blocks = [block(**fields, merge_r=r, name=f"blocks_{i}") for i, r in enumerate(merges)]
        source_map = token_merging.unmerged(x) if merging else None
        for each in blocks:
            x, slots = each(x, token_merging.slot_sizes(source_map, x.shape[1]) if merging else None)
            if slots is not None:
                source_map = token_merging.compose(source_map, slots)
        return VisionOutput(x, source_map)


def visual_tokens(vit: ViT, images: jax.Array, trained: bool = False) -> VisionOutput:
    """Returns the tokens (B, T, D) of pictures, or (B, F, T, D) of clips.

    Args:
      images: (B, H, W, 3), or clips (B, F, H, W, 3); uint8, or normalised floats. For a temporal ViT a picture is a
        clip of one frame.
      trained: whether gradients flow into the ViT.
    """
    if images.dtype == jnp.uint8:
        images = vit.normalize(images)
    if vit.temporal and images.ndim == 4:
        images = images[:, None]
    seen = vit.encode(images)
    return seen if trained else VisionOutput(jax.lax.stop_gradient(seen.tokens), seen.source_map)


def _nth(block: Block, stacked: dict, i: int) -> Callable[..., tuple[jax.Array, jax.Array | None]]:
    """Returns a block with row i of stacked parameters."""
    return functools.partial(block.apply, {"params": jax.tree.map(lambda x: x[i], stacked)})
