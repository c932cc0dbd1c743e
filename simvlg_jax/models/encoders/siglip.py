"""The vision encoder of SigLIP (arXiv 2303.15343), and of SigLIP 2 (arXiv 2502.14786) at fixed resolution."""

from simvlg_jax.models.encoders.vit import ViT

# One block fewer than published: we take the penultimate layer, as the published recipe does with EVA-CLIP. It is
# transformers' hidden_states[-2]. It comes before post_layernorm and the pooling head, which serve only the contrastive
# training.
BASE = dict(width=768, depth=11, num_heads=12, mlp_dim=3072)
LARGE = dict(width=1024, depth=23, num_heads=16, mlp_dim=4096)
SO400M = dict(width=1152, depth=26, num_heads=16, mlp_dim=4304)

SIGLIP_SIZES = {  # siglip_b16_224: google/siglip-base-patch16-224, google/siglip2-base-patch16-224
    "siglip_b16_224": dict(image_size=224, patch_size=16, **BASE),
    "siglip_b16_256": dict(image_size=256, patch_size=16, **BASE),
    "siglip_b16_384": dict(image_size=384, patch_size=16, **BASE),
    "siglip_b16_512": dict(image_size=512, patch_size=16, **BASE),
    "siglip_b32_256": dict(image_size=256, patch_size=32, **BASE),
    "siglip_l16_256": dict(image_size=256, patch_size=16, **LARGE),
    "siglip_l16_384": dict(image_size=384, patch_size=16, **LARGE),
    "siglip_l16_512": dict(image_size=512, patch_size=16, **LARGE),
    "siglip_so400m14_224": dict(image_size=224, patch_size=14, **SO400M),
    "siglip_so400m14_384": dict(image_size=384, patch_size=14, **SO400M),
    "siglip_so400m16_256": dict(image_size=256, patch_size=16, **SO400M),
    "siglip_so400m16_384": dict(image_size=384, patch_size=16, **SO400M),
    "siglip_so400m16_512": dict(image_size=512, patch_size=16, **SO400M),
    "siglip_tiny": dict(image_size=32, patch_size=8, width=32, depth=2, num_heads=2, mlp_dim=64),
}


class Siglip(ViT):
    """A `ViT` without a class token, with biased keys, the tanh form of GELU and pictures scaled to -1..1."""

    class_token: bool = False
    key_bias: bool = True
    activation: str = "tanh_gelu"
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
