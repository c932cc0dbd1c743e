"""Converts EVA-CLIP's and CLIP's weights between our scanned `ViT` tree and published PyTorch files.

Four formats are read, and recognised by their names: EVA-CLIP and CLIP of LAVIS, CLIP of Hugging Face, and the vision
tower of a Hugging Face BLIP-2. All of them are renamed to the first format before they are read, and the first is the
only one that is written. For CLIP it also has `attn.k_bias` and `norm_pre`, and lacks `patch_embed.proj.bias`. The
PyTorch form of a model with SigLIP has these names too, without `cls_token`.
"""

import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from simvlg_jax.convert import stacking, weight_map
from simvlg_jax.convert.weight_map import Row, Tensors
from simvlg_jax.models.encoders.vit import ViT
from simvlg_jax.parallel import lazy
from simvlg_jax.utils.errors import UserError

BLOCK = [
    *weight_map.layer_norm("blocks_{i}/norm1", "blocks.{i}.norm1"),
    *weight_map.layer_norm("blocks_{i}/norm2", "blocks.{i}.norm2"),
    Row("blocks_{i}/query/kernel", "blocks.{i}.attn.q.weight", "heads_out"),
    Row("blocks_{i}/query/bias", "blocks.{i}.attn.q_bias", "heads_bias"),
    Row("blocks_{i}/key/kernel", "blocks.{i}.attn.k.weight", "heads_out"),
    Row("blocks_{i}/value/kernel", "blocks.{i}.attn.v.weight", "heads_out"),
    Row("blocks_{i}/value/bias", "blocks.{i}.attn.v_bias", "heads_bias"),
    *weight_map.merge_heads("blocks_{i}/out", "blocks.{i}.attn.proj"),
    *weight_map.linear("blocks_{i}/mlp/fc1", "blocks.{i}.mlp.fc1"),
    *weight_map.linear("blocks_{i}/mlp/fc2", "blocks.{i}.mlp.fc2"),
]
PATCHES = "patch_embed.proj.weight"
ENDS = [Row("position", "pos_embed"), Row("patch_embed/kernel", PATCHES, "patches")]
CLASS_TOKEN = Row("cls", "cls_token")  # EVA and CLIP
PATCH_BIAS = Row("patch_embed/bias", "patch_embed.proj.bias")  # EVA and SigLIP
KEY_BIAS = Row("blocks_{i}/key/bias", "blocks.{i}.attn.k_bias", "heads_bias")  # CLIP and SigLIP
INPUT_NORM = weight_map.layer_norm("input_norm", "norm_pre")  # CLIP

LAVIS_CLIP = {
    r"class_embedding": "cls_token",
    r"positional_embedding": "pos_embed",
    r"conv1\.weight": PATCHES,
    r"ln_pre\.": "norm_pre.",
    r"transformer\.resblocks\.(\d+)\.ln_(\d)\.": r"blocks.\1.norm\2.",
    r"transformer\.resblocks\.(\d+)\.attn\.in_proj_weight": r"blocks.\1.attn.qkv.weight",
    r"transformer\.resblocks\.(\d+)\.attn\.in_proj_bias": r"blocks.\1.attn.qkv.bias",
    r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.": r"blocks.\1.attn.proj.",
    r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.": r"blocks.\1.mlp.fc1.",
    r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.": r"blocks.\1.mlp.fc2.",
}
HUGGING_FACE = {  # CLIP and BLIP-2
    r"embeddings\.class_embedding": "cls_token",
    r"embeddings\.position_embedding(\.weight)?": "pos_embed",
    r"embeddings\.patch_embedding\.": "patch_embed.proj.",
    r"pre_layrnorm\.": "norm_pre.",
    r"encoder\.layers\.(\d+)\.layer_norm(\d)\.": r"blocks.\1.norm\2.",
    r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.weight": r"blocks.\1.attn.\2.weight",
    r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.bias": r"blocks.\1.attn.\2_bias",
    r"encoder\.layers\.(\d+)\.self_attn\.qkv\.": r"blocks.\1.attn.qkv.",
    r"encoder\.layers\.(\d+)\.self_attn\.(out_proj|projection)\.": r"blocks.\1.attn.proj.",
    r"encoder\.layers\.(\d+)\.mlp\.": r"blocks.\1.mlp.",
}
IGNORED = ("norm.", "fc_norm.", "head.", "ln_post.", "proj", "post_layernorm.", "embeddings.position_ids")


def rows(model: ViT) -> list[Row]:
    """Returns the rows of a ViT, with the class token, the biases and the norm that it has."""
    ends = [*([CLASS_TOKEN] if model.class_token else []), *ENDS, *([PATCH_BIAS] if model.patch_bias else [])]
    ends += INPUT_NORM if model.input_norm else []
    return [*ends, *weight_map.numbered([*BLOCK, *([KEY_BIAS] if model.key_bias else [])], model.depth)]


def from_torch(model: ViT, tensors: Mapping, align_corners: bool = False) -> dict:
    """Returns the scanned model's parameters from any of the four formats.

    Blocks after the model's last one are ignored, as published.

    Args:
      align_corners: how positions of another picture size are resized, see `resize_positions`.

    Raises:
      UserError: the file has another format, names are missing or left over, keys have a bias that the model lacks, or
        there is no class token.
    """
    tensors = renamed(tensors)
    named: Tensors = {}
    for name in tensors:
        block = re.match(r"blocks\.(\d+)\.", name)
        if not (block and int(block[1]) >= model.depth):
            named |= unfused(name, tensors[name], model.key_bias)
    if model.class_token and "cls_token" not in named:
        raise UserError("the file holds a vision encoder without a class token, as SigLIP's: choose its vit.size")
    if "pos_embed" in named:
        named["pos_embed"] = resize_positions(
            named["pos_embed"], model.num_tokens, align_corners, class_token=model.class_token
        )
    if model.class_token:
        named["cls_token"] = named["cls_token"].reshape(1, 1, -1)
    return stacking.stack_layers(weight_map.from_torch(rows(model), named, model.num_heads, IGNORED))


def renamed(tensors: Mapping) -> Mapping:
    """Returns the tensors of any of the four formats under LAVIS's EVA names. They are read when they are used.

    Raises:
      UserError: the file has another format.
    """
    if "cls_token" in tensors or PATCHES in tensors:
        return tensors
    if "class_embedding" in tensors:
        table, within = LAVIS_CLIP, ""
    else:
        start = next((n for n in tensors if n.endswith("embeddings.class_embedding")), None)
        if start is None:
            raise UserError(
                "no known vision encoder here: looked for cls_token (EVA-CLIP of LAVIS), class_embedding (CLIP of "
                "LAVIS) and vision_model.embeddings.class_embedding (Hugging Face's CLIP or BLIP-2)"
            )
        table, within = HUGGING_FACE, start.removesuffix("embeddings.class_embedding")
    names = {}
    for name in tensors:
        if name.startswith(within):
            short = name.removeprefix(within)
            hits = [re.sub(f"^{old}", new, short) for old, new in table.items() if re.match(old, short)]
            names[hits[0] if hits else short] = name
    return weight_map.View(tensors, names)


def unfused(name: str, tensor: np.ndarray, key_bias: bool) -> Tensors:
    """Splits a fused query-key-value matrix (3 D, D) or bias (3 D,) in three parts; returns other tensors as they are.

    Raises:
      UserError: keys have a bias that the model lacks.
    """
    match = re.fullmatch(r"(blocks\.\d+\.attn\.)qkv\.(weight|bias)", name)
    if not match:
        return {name: tensor}
    form = "{}{}.weight" if match[2] == "weight" else "{}{}_bias"
    parts = {form.format(match[1], letter): part for letter, part in zip("qkv", lazy.split(tensor, 3), strict=True)}
    if not key_bias and np.any(parts.pop(f"{match[1]}k_bias", 0)):  # BLIP-2 keeps zeros for it
        raise UserError(f"{name} has a bias for the keys, which this vision encoder lacks")
    return parts


def to_torch(model: ViT, params: Mapping) -> Tensors:
    """The inverse of `from_torch`, under LAVIS's EVA names. It can be traced."""
    tensors = weight_map.to_torch(rows(model), stacking.unstack_layers(dict(params)))
    for i in range(model.depth):
        parts = [tensors.pop(f"blocks.{i}.attn.{name}.weight") for name in "qkv"]
        join: Callable = jnp.concatenate if isinstance(parts[0], jax.Array) else np.concatenate
        tensors[f"blocks.{i}.attn.qkv.weight"] = join(parts)
    return tensors


def resize_positions(
    position: np.ndarray, num_tokens: int, align_corners: bool, class_token: bool = True
) -> np.ndarray:
    """Resizes the square grid of position embeddings (N, D) or (1, N, D) bicubically; returns (1, num_tokens, D).

    Args:
      num_tokens: number of places in the new grid, plus one for a class token.
      align_corners: as in torch's `interpolate`. Published: True for CLIP, False for EVA and SigLIP.
      class_token: whether the first row belongs to a class token. That row is not changed.
    """
    position = position.reshape(1, -1, position.shape[-1])
    old, new = (round((n - class_token) ** 0.5) for n in (position.shape[1], num_tokens))
    if old == new:
        return position
    weights = bicubic_weights(old, new, align_corners)  # (new, old)
    position = np.asarray(position)
    grid = position[0, class_token:].astype(np.float32).reshape(old, old, -1)
    grid = np.einsum("io,jp,opd->ijd", weights, weights, grid).reshape(1, new * new, -1)
    return np.concatenate([position[:, :class_token], grid.astype(position.dtype)], 1)


def bicubic_weights(old: int, new: int, align_corners: bool) -> np.ndarray:
    """Returns the weight (new, old) of each old place in each new one: Keys' kernel with a = -0.75, edges repeated."""
    index = np.arange(new)
    places = index * (old - 1) / max(new - 1, 1) if align_corners else (index + 0.5) * old / new - 0.5
    weights = np.zeros((new, old))
    for offset in range(-1, 3):
        source = np.floor(places).astype(int) + offset
        distance = np.abs(places - source)
        near = 1.25 * distance**3 - 2.25 * distance**2 + 1
        far = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        np.add.at(weights, (index, np.clip(source, 0, old - 1)), np.where(distance <= 1, near, far))
    return weights
