"""The published checkpoint's names (EVLGen, image model with a LLaMA) and our SimVLG parameters.

The vision encoder's rows are EVA-CLIP's: one matrix for query, key and value, and no bias for the key.
"""

from collections.abc import Mapping

import numpy as np

from simvlg_jax.convert import bert, hf_llama, stacking, weight_map
from simvlg_jax.convert.weight_map import Row, Tensors
from simvlg_jax.models.simvlg import SimVLG

VIT_BLOCK = [
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
VIT_ENDS = [
    Row("cls", "cls_token"),
    Row("position", "pos_embed"),
    *weight_map.linear("patch_embed", "patch_embed.proj"),
]
TRAINED = [
    *weight_map.layer_norm("ln_vision", "ln_vision"),
    *weight_map.linear("vl_proj", "VL_proj"),
    *weight_map.linear("llm_proj", "llm_proj"),
]


def within(tensors: Mapping[str, np.ndarray], prefix: str) -> Tensors:
    """The tensors under a prefix, without it."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def vit_from_torch(tensors: Mapping[str, np.ndarray], depth: int, num_heads: int) -> dict:
    """EVA-CLIP's tensors as a scanned `ViT`; blocks after the `depth`th are ignored, as published."""
    split = dict(tensors)
    for i in range(depth):
        fused = split.pop(f"blocks.{i}.attn.qkv.weight")  # (3 D, D)
        for name, part in zip("qkv", np.split(fused, 3), strict=True):
            split[f"blocks.{i}.attn.{name}.weight"] = part
    kernel = split["patch_embed.proj.weight"]  # (D, 3, P, P) -> (D, P P 3): our patches run (row, column, channel)
    split["patch_embed.proj.weight"] = kernel.transpose(0, 2, 3, 1).reshape(len(kernel), -1)
    rows = [*VIT_ENDS, *weight_map.numbered(VIT_BLOCK, depth)]
    return stacking.stack_layers(weight_map.from_torch(rows, split, num_heads, [f"blocks.{depth}."]))


def simvlg_from_torch(model: SimVLG, tensors: Mapping[str, np.ndarray]) -> dict:
    """All parameters of a scanned image SimVLG with a LLaMA from a published state dict.

    Raises:
      UserError: names missing or left over, both lists shown.
    """
    connector = bert.encoder_rows(model.connector.depth)
    trained = {n: x for n, x in tensors.items() if n.startswith(("ln_vision.", "VL_proj.", "llm_proj."))}
    return {
        **weight_map.from_torch(TRAINED, trained, 1),
        "vit": vit_from_torch(within(tensors, "visual_encoder."), model.vit.depth, model.vit.num_heads),
        "connector": weight_map.from_torch(connector, within(tensors, "VLconnector."), model.connector.num_heads),
        "llm": hf_llama.from_hf(tensors, model.llm.num_heads, "llm_model."),
    }


def trained_to_torch(params: Mapping) -> Tensors:
    """The trained parameters under their published names; also for their gradients."""
    depth = sum(name.startswith("layer_") for name in params["connector"])
    connector = weight_map.to_torch(bert.encoder_rows(depth), params["connector"])
    named = {f"VLconnector.{name}": x for name, x in connector.items()}
    return {**weight_map.to_torch(TRAINED, params), **named}
