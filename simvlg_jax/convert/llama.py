"""LLaMA weights between our scanned tree and Hugging Face names (LlamaForCausalLM)."""

from collections.abc import Mapping

import numpy as np

from simvlg_jax.convert import stacking, weight_map
from simvlg_jax.convert.weight_map import Row, Tensors
from simvlg_jax.utils.errors import UserError

# Attention kernels go through the table as matrices, (D, N H) or (N H, D); `from_hf` and `to_hf` see to the head axis.
LAYER = [
    Row("blocks_{i}/attention_norm/scale", "model.layers.{i}.input_layernorm.weight"),
    Row("blocks_{i}/query/kernel", "model.layers.{i}.self_attn.q_proj.weight", "linear"),
    Row("blocks_{i}/key/kernel", "model.layers.{i}.self_attn.k_proj.weight", "linear"),
    Row("blocks_{i}/value/kernel", "model.layers.{i}.self_attn.v_proj.weight", "linear"),
    Row("blocks_{i}/out/kernel", "model.layers.{i}.self_attn.o_proj.weight", "linear"),
    Row("blocks_{i}/mlp_norm/scale", "model.layers.{i}.post_attention_layernorm.weight"),
    Row("blocks_{i}/gate/kernel", "model.layers.{i}.mlp.gate_proj.weight", "linear"),
    Row("blocks_{i}/up/kernel", "model.layers.{i}.mlp.up_proj.weight", "linear"),
    Row("blocks_{i}/down/kernel", "model.layers.{i}.mlp.down_proj.weight", "linear"),
]
ENDS = [Row("embedding", "model.embed_tokens.weight"), Row("norm/scale", "model.norm.weight")]
HEAD = Row("lm_head", "lm_head.weight", "linear")


def rows(depth: int, tied: bool, prefix: str = "") -> list[Row]:
    """Every parameter of a model; `tied` ones have no output matrix of their own."""
    table = [*ENDS, *([] if tied else [HEAD]), *weight_map.numbered(LAYER, depth)]
    return [row._replace(torch=prefix + row.torch) for row in table]


def from_hf(tensors: Mapping[str, np.ndarray], num_heads: int, prefix: str = "") -> dict:
    """Parameters of a scanned `Llama` from Hugging Face tensors whose names start with `prefix`; dtypes are kept.

    The depth is that of the names, and a model without `lm_head.weight` is a tied one.

    Raises:
      UserError: names missing or left over, both lists shown.
    """
    tensors = weight_map.View(tensors, {name: name for name in tensors if name.startswith(prefix)})
    start = f"{prefix}model.layers."
    depth = len({name[len(start) :].split(".")[0] for name in tensors if name.startswith(start)})
    if depth == 0:
        raise UserError(f"no LLaMA layers here: no name starts with {start!r}")
    tied = prefix + HEAD.torch not in tensors
    params = weight_map.from_torch(rows(depth, tied, prefix), tensors, num_heads)
    head_dim = params["blocks_0"]["query"]["kernel"].shape[-1] // num_heads
    for i in range(depth):
        block = params[f"blocks_{i}"]
        for name in ("query", "key", "value"):
            kernel = block[name]["kernel"]  # (D, N H)
            block[name]["kernel"] = kernel.reshape(kernel.shape[0], -1, head_dim)
        kernel = block["out"]["kernel"]  # (N H, D)
        block["out"]["kernel"] = kernel.reshape(-1, head_dim, kernel.shape[-1])
    return stacking.stack_layers(params)


def to_hf(params: Mapping, prefix: str = "") -> Tensors:
    """The inverse of `from_hf`: arrays by Hugging Face name."""
    unrolled = stacking.unstack_layers(dict(params))
    depth = sum(name.startswith("blocks_") for name in unrolled)
    for i in range(depth):
        block = dict(unrolled[f"blocks_{i}"])
        for name in ("query", "key", "value"):
            kernel = block[name]["kernel"]  # (D, N, H)
            block[name] = {"kernel": kernel.reshape(kernel.shape[0], -1)}
        kernel = block["out"]["kernel"]  # (N, H, D)
        block["out"] = {"kernel": kernel.reshape(-1, kernel.shape[-1])}
        unrolled[f"blocks_{i}"] = block
    return weight_map.to_torch(rows(depth, "lm_head" not in params, prefix), unrolled)
