"""CLIP's vision encoder."""

from simvlg_jax.models.encoders.vit import ViT

CLIP_SIZES = {
    "clip_l": dict(image_size=224, patch_size=14, width=1024, depth=23, num_heads=16, mlp_dim=4096),
}


class Clip(ViT):
    """A `ViT` with a LayerNorm before the first block, biased keys, no bias for patches, and its own GELU."""

    key_bias: bool = True
    patch_bias: bool = False
    activation: str = "quick_gelu"
    input_norm: bool = True
    norm_eps: float = 1e-5
