"""Vision-encoder weights between our scanned `ViT` tree and published PyTorch files."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from simvlg_jax.convert import stacking, weight_map
from simvlg_jax.convert.weight_map import Row, Tensors

# EVA-CLIP: one matrix for query, key and value, and no bias for the key.
EVA_BLOCK = [
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
EVA_ENDS = [
    Row("cls", "cls_token"),
    Row("position", "pos_embed"),
    *weight_map.linear("patch_embed", "patch_embed.proj"),
]
EVA_PATCHES = "patch_embed.proj.weight"  # (D, 3, P, P); ours are flattened (row, column, channel)


def eva_rows(depth: int) -> list[Row]:
    return [*EVA_ENDS, *weight_map.numbered(EVA_BLOCK, depth)]


def vit_from_torch(tensors: Mapping, depth: int, num_heads: int) -> dict:
    """EVA-CLIP's tensors as a scanned `ViT`; blocks after the `depth`th are ignored, as published."""
    split = dict(tensors)
    for i in range(depth):
        fused = split.pop(f"blocks.{i}.attn.qkv.weight")  # (3 D, D)
        for name, part in zip("qkv", np.split(fused, 3), strict=True):
            split[f"blocks.{i}.attn.{name}.weight"] = part
    kernel = split[EVA_PATCHES]
    split[EVA_PATCHES] = kernel.transpose(0, 2, 3, 1).reshape(len(kernel), -1)
    return stacking.stack_layers(weight_map.from_torch(eva_rows(depth), split, num_heads, [f"blocks.{depth}."]))


def vit_to_torch(params: Mapping) -> Tensors:
    """The inverse of `vit_from_torch`, under EVA-CLIP's names. Traceable."""
    unrolled = stacking.unstack_layers(dict(params))
    depth = sum(name.startswith("blocks_") for name in unrolled)
    tensors = weight_map.to_torch(eva_rows(depth), unrolled)
    for i in range(depth):
        parts = [tensors.pop(f"blocks.{i}.attn.{name}.weight") for name in "qkv"]
        join = jnp.concatenate if isinstance(parts[0], jax.Array) else np.concatenate
        tensors[f"blocks.{i}.attn.qkv.weight"] = join(parts)
    kernel = tensors[EVA_PATCHES]  # (D, P P 3)
    side = round((kernel.shape[1] // 3) ** 0.5)
    tensors[EVA_PATCHES] = kernel.reshape(-1, side, side, 3).transpose(0, 3, 1, 2)
    return tensors
