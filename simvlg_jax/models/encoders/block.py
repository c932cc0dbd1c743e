"""A block of the vision encoder, which can merge tokens between its attention and its MLP."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from simvlg_jax.models import layers, token_merging
from simvlg_jax.models.attention import attend
from simvlg_jax.models.encoders.temporal_merge import TemporalMerge
from simvlg_jax.models.fused_attention import attend_fused

ACTIVATIONS = {"gelu": layers.gelu, "quick_gelu": layers.quick_gelu, "tanh_gelu": nn.gelu}


class Block(nn.Module):
    """x += attention(LN x); x += alpha temporal(x), for video alone; merge; x += mlp(LN x). Fields as in `ViT`.

    The merge is ToMe's (arXiv 2210.09461, section 3): tokens are compared by the keys of this block, averaged over the
    heads, and each output token is the mean of all the patches that it is made of.

    Attributes:
      merge_r: number of tokens to merge away.
    """

    num_heads: int
    mlp_dim: int
    key_bias: bool
    activation: str
    norm_eps: float
    temporal: bool
    class_token: bool
    dtype: DTypeLike
    merge_r: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, sizes: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
        """Applies the block.

        Args:
          x: (B, T, D), or clips (B, F, T, D).
          sizes: (B, T) float32, how many patches each token is made of. A token draws as much attention as all of them,
            and has their weight in a merge. None: one each.

        Returns:
          (x with T - r tokens; the slots of the merge (B, T) int32, see `token_merging.match`, None if r is 0).
        """
        shape, width = x.shape, x.shape[-1]
        x = x.reshape(-1, *shape[-2:])
        heads, dtype = (width, self.num_heads, width // self.num_heads), self.dtype
        y = layers.LayerNorm(self.norm_eps, name="norm1")(x)
        query = layers.split_heads(*heads, dtype=dtype, name="query")(y)
        key = layers.split_heads(*heads, use_bias=self.key_bias, bias_grad=False, dtype=dtype, name="key")(y)
        value = layers.split_heads(*heads, dtype=dtype, name="value")(y)
        if sizes is None:
            context = attend_fused(query, key, value)  # (B, T, N, H)
        else:
            context = attend(query, key, value, bias=jnp.log(sizes)[:, None])
        x = x + layers.merge_heads(*heads, dtype=dtype, name="out")(context)
        if self.temporal:
            clips = x.reshape(shape)
            x = (clips + TemporalMerge(dtype=self.dtype, name="temporal_merge")(clips)).reshape(x.shape)
        x, slots = token_merging.merge_by_keys(x, key, self.merge_r, self.class_token, sizes)
        y = layers.LayerNorm(self.norm_eps, name="norm2")(x)
        x = x + layers.Mlp(self.mlp_dim, ACTIVATIONS[self.activation], dtype=self.dtype, name="mlp")(y)
        return layers.split_batch(x.reshape(*shape[:-2], *x.shape[1:])), slots
