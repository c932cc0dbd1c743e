"""Converts vision weights of SigLIP and SigLIP 2 between our scanned `Siglip` tree and Hugging Face's names.

It also reads the names of our PyTorch form of a whole model, which are EVA's.
"""

from collections.abc import Mapping

from simvlg_jax.convert import stacking, vit, weight_map
from simvlg_jax.convert.weight_map import Row, Tensors
from simvlg_jax.models.encoders.siglip import Siglip
from simvlg_jax.utils.errors import UserError

LAYER = "encoder.layers.{i}"
BLOCK = [
    *weight_map.layer_norm("blocks_{i}/norm1", f"{LAYER}.layer_norm1"),
    *weight_map.layer_norm("blocks_{i}/norm2", f"{LAYER}.layer_norm2"),
    *weight_map.query_key_value("blocks_{i}/query", f"{LAYER}.self_attn.q_proj"),
    *weight_map.query_key_value("blocks_{i}/key", f"{LAYER}.self_attn.k_proj"),
    *weight_map.query_key_value("blocks_{i}/value", f"{LAYER}.self_attn.v_proj"),
    *weight_map.merge_heads("blocks_{i}/out", f"{LAYER}.self_attn.out_proj"),
    *weight_map.linear("blocks_{i}/mlp/fc1", f"{LAYER}.mlp.fc1"),
    *weight_map.linear("blocks_{i}/mlp/fc2", f"{LAYER}.mlp.fc2"),
]
PATCHES, POSITION = "embeddings.patch_embedding", "embeddings.position_embedding.weight"
ENDS = [
    Row("patch_embed/kernel", f"{PATCHES}.weight", "patches"),
    Row("patch_embed/bias", f"{PATCHES}.bias"),
    Row("position", POSITION, "positions"),
]
IGNORED = ("post_layernorm.", "head.", "embeddings.position_ids")


def rows(depth: int) -> list[Row]:
    return [*ENDS, *weight_map.numbered(BLOCK, depth)]


def from_torch(model: Siglip, tensors: Mapping) -> dict:
    """Returns the scanned model's parameters from a vision tower. The file may also hold the text tower.

    Blocks after the model's last one are ignored. Positions of another picture size are resized.

    Raises:
      UserError: the file has another format, or names are missing or left over.
    """
    if vit.PATCHES in tensors and "cls_token" not in tensors:
        return vit.from_torch(model, tensors)
    start = next((name for name in tensors if name.endswith(f"{PATCHES}.bias")), None)
    if start is None:
        raise UserError(f"no SigLIP weights here: looked for vision_model.{PATCHES}.bias")
    vision = weight_map.within(tensors, start.removesuffix(f"{PATCHES}.bias"))
    ignored = [name for name in vision if name.startswith("encoder.layers.") and int(name.split(".")[2]) >= model.depth]
    params = weight_map.from_torch(rows(model.depth), vision, model.num_heads, [*IGNORED, *ignored])
    params["position"] = vit.resize_positions(params["position"], model.num_tokens, False, class_token=False)
    return stacking.stack_layers(params)


def to_torch(model: Siglip, params: Mapping) -> Tensors:
    """The inverse of `from_torch`, in the names of transformers' `SiglipModel`. It can be traced."""
    tensors = weight_map.to_torch(rows(model.depth), stacking.unstack_layers(dict(params)))
    return {f"vision_model.{name}": x for name, x in tensors.items()}
