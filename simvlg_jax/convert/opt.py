"""Converts OPT weights between our scanned tree and Hugging Face's names (OPTForCausalLM)."""

from collections.abc import Mapping

import numpy as np

from simvlg_jax.convert import stacking, weight_map
from simvlg_jax.convert.weight_map import Row, Tensors
from simvlg_jax.models.llms.opt import Opt
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
NORM = weight_map.layer_norm("norm", "final_layer_norm")
PROJECTIONS = [
    Row("project_in/kernel", "project_in.weight", "linear"),
    Row("project_out/kernel", "project_out.weight", "linear"),
]
HEAD = "lm_head.weight"  # equals the embedding; files may lack it
DECODER = "model.decoder."


def rows(llm: Opt) -> list[Row]:
    """Returns a row for every parameter of a model. OPT-350m has no last norm; it alone has projections."""
    norm = NORM if llm.pre_norm else []
    projections = PROJECTIONS if llm.embed_width not in (None, llm.width) else []
    return [*ENDS, *norm, *projections, *weight_map.numbered(LAYER, llm.depth)]


def from_hf(llm: Opt, tensors: Mapping[str, np.ndarray], prefix: str = "") -> dict:
    """Returns the parameters of a scanned model from the tensors whose names start with `prefix`, in their dtypes.

    Files of the decoder alone ("decoder.layers...") are read too.

    Raises:
      UserError: names are missing or left over. The message lists both.
    """
    start = next((s for s in (prefix + DECODER, prefix + "decoder.") if f"{s}embed_tokens.weight" in tensors), None)
    if start is None:
        raise UserError(f"no OPT here: no {prefix + DECODER}embed_tokens.weight")
    decoder = weight_map.within(tensors, start)
    return stacking.stack_layers(weight_map.from_torch(rows(llm), decoder, llm.num_heads))


def to_hf(llm: Opt, params: Mapping, prefix: str = "") -> Tensors:
    """The inverse of `from_hf`. It also writes the tied head, as Hugging Face's state dict does."""
    tensors = weight_map.to_torch(rows(llm), stacking.unstack_layers(dict(params)))
    named = {f"{prefix}{DECODER}{name}": x for name, x in tensors.items()}
    return {**named, prefix + HEAD: tensors["embed_tokens.weight"]}


def hf_config(llm: Opt) -> dict:
    """Returns the fields of transformers' config, without its type."""
    return dict(
        hidden_size=llm.width,
        num_hidden_layers=llm.depth,
        num_attention_heads=llm.num_heads,
        ffn_dim=llm.ffn,
        vocab_size=llm.vocab_size,
        max_position_embeddings=llm.max_positions,
        word_embed_proj_dim=llm.embed_width or llm.width,
        do_layer_norm_before=llm.pre_norm,
        dropout=llm.dropout,
        tie_word_embeddings=True,
    )
