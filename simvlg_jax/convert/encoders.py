"""The table of vision encoders: all that depends on the encoder, except its module itself."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jax.typing import DTypeLike

from simvlg_jax.convert import siglip, vit
from simvlg_jax.convert.weight_map import Tensors
from simvlg_jax.models import token_merging
from simvlg_jax.models.encoders.clip import CLIP_SIZES, Clip
from simvlg_jax.models.encoders.siglip import SIGLIP_SIZES, Siglip
from simvlg_jax.models.encoders.vit import VIT_SIZES, ViT
from simvlg_jax.utils.errors import UserError


class Encoder(NamedTuple):
    """Vision encoders of one architecture.

    Attributes:
      module: their Linen module, a `ViT` or a subclass. No other entry has it.
      sizes: name, a value of `config.vit.size` -> fields of the module.
      from_torch: (model, published tensors) -> the scanned model's parameters.
      to_torch: (model, parameters of a scanned model) -> tensors that `from_torch` reads.
    """

    module: type[ViT]
    sizes: dict[str, dict]
    from_torch: Callable[[ViT, Mapping], dict]
    to_torch: Callable[[ViT, Mapping], Tensors]


ENCODERS = {
    "eva": Encoder(ViT, VIT_SIZES, vit.from_torch, vit.to_torch),
    "clip": Encoder(Clip, CLIP_SIZES, functools.partial(vit.from_torch, align_corners=True), vit.to_torch),
    "siglip": Encoder(Siglip, SIGLIP_SIZES, siglip.from_torch, siglip.to_torch),
}


def build(config: Mapping, dtype: DTypeLike) -> ViT:
    """Returns the vision encoder of a config's `vit`.

    Raises:
      UserError (status 2): no encoder has this size, or it cannot merge its tokens as the config says.
    """
    known = {name: encoder for encoder in ENCODERS.values() for name in encoder.sizes}
    if config.size not in known:
        raise UserError(f"vit.size is {config.size!r}; it takes {', '.join(map(repr, known))}", 2)
    options = {name: config[name] for name in ("temporal", "max_frames", "scan", "remat")}
    encoder = known[config.size]
    vit = encoder.module(**encoder.sizes[config.size], **options, dtype=dtype)
    try:
        merges = token_merging.schedule_of(config, "vit", vit.depth, vit.num_tokens, vit.class_token)
    except ValueError as error:
        raise UserError(str(error), 2) from error
    return vit.clone(merges=merges)


def of_model(model: ViT) -> Encoder:
    """Returns the entry of a vision encoder."""
    return next(encoder for encoder in ENCODERS.values() if encoder.module is type(model))
