"""OPT weights between our scanned tree and Hugging Face names (OPTForCausalLM)."""

from collections.abc import Mapping

from simvlg_jax.convert import stacking, weight_map
from simvlg_jax.convert.weight_map import Row, Tensors
from simvlg_jax.utils.errors import UserError

LAYER = [
    *weight_map.layer_norm("blocks_{i}/attention_norm", "layers.{i}.self_attn_layer_norm"),
    *weight_map.query_key_value("blocks_{i}/query", "layers.{i}.self_attn.q_proj"),
    *weight_map.query_key_value("blocks_{i}/key", "layers.{i}.self_attn.k_proj"),
    *weight_map.query_key_value("blocks_{i}/value", "layers.{i}.self_attn.v_proj"),
    *weight_map.merge_heads("blocks_{i}/out", "layers.{i}.self_attn.out_proj"),
    *weight_map.layer_norm("blocks_{i}/mlp_norm", "layers.{i}.final_layer_norm"),
    *weight_map.linear("blocks_{i}/mlp/fc1", "layers.{i}.fc1"),
    *weight_map.linear("blocks_{i}/mlp/fc2", "layers.{i}.fc2"),
]
ENDS = [Row("embedding", "embed_tokens.weight"), Row("position", "embed_positions.weight")]
NORM = weight_map.layer_norm("norm", "final_layer_norm")  # not in OPT-350m
PROJECTIONS = [  # only in OPT-350m
    Row("project_in/kernel", "project_in.weight", "linear"),
    Row("project_out/kernel", "project_out.weight", "linear"),
]
HEAD = "lm_head.weight"  # the embedding once more, which files may leave out
DECODER = "model.decoder."


def rows(names: Mapping | set, depth: int) -> list[Row]:
    """The table of a model that has these names, on either side: the last norm and the projections are optional."""
    optional = [row for row in (*NORM, *PROJECTIONS) if row.torch in names or row.ours in names]
    return [*ENDS, *optional, *weight_map.numbered(LAYER, depth)]


def from_hf(tensors: Mapping, num_heads: int, prefix: str = "") -> dict:
    """Parameters of a scanned `Opt` from Hugging Face tensors whose names start with `prefix`; dtypes are kept.

    Files saved from the bare decoder ("decoder.layers...") are read too.

    Raises:
      UserError: names missing or left over, both lists shown.
    """
    start = next((s for s in (prefix + DECODER, prefix + "decoder.") if f"{s}embed_tokens.weight" in tensors), None)
    if start is None:
        raise UserError(f"no OPT here: no {prefix + DECODER}embed_tokens.weight")
    decoder = weight_map.within(tensors, start)
    depth = len({name.split(".")[1] for name in decoder if name.startswith("layers.")})
    return stacking.stack_layers(weight_map.from_torch(rows(set(decoder), depth), decoder, num_heads))


def to_hf(params: Mapping, prefix: str = "") -> Tensors:
    """The inverse of `from_hf`, the tied `lm_head.weight` included, as Hugging Face's state dict has it."""
    params = stacking.unstack_layers(dict(params))
    depth = sum(name.startswith("blocks_") for name in params)
    names = {f"{top}/{leaf}" for top in ("norm", "project_in", "project_out") for leaf in params.get(top, ())}
    tensors = weight_map.to_torch(rows(names, depth), params)
    named = {f"{prefix}{DECODER}{name}": x for name, x in tensors.items()}
    return {**named, prefix + HEAD: named[f"{prefix}{DECODER}embed_tokens.weight"]}
