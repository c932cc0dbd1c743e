"""Converts LLaMA and Qwen weights between our scanned tree and Hugging Face's names (LlamaForCausalLM)."""

from collections.abc import Mapping

import numpy as np

from simvlg_jax.convert import stacking, weight_map
from simvlg_jax.convert.weight_map import Row, Tensors
from simvlg_jax.models.llms.llama import Llama
from simvlg_jax.utils.errors import UserError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def rows(llm: Llama) -> list[Row]:
    """Returns a row for every parameter of a model. A tied model has no row for its head, which is the embedding."""
    ours, theirs = "blocks_{i}", "model.layers.{i}"
    layer = [
        Row(f"{ours}/attention_norm/scale", f"{theirs}.input_layernorm.weight"),
        Row(f"{ours}/out/kernel", f"{theirs}.self_attn.o_proj.weight", "heads_in"),
        Row(f"{ours}/mlp_norm/scale", f"{theirs}.post_attention_layernorm.weight"),
        *[
            Row(f"{ours}/{name}/kernel", f"{theirs}.mlp.{name}_proj.weight", "linear")
            for name in ("gate", "up", "down")
        ],
    ]
    for name, heads in (("query", llm.num_heads), ("key", llm.num_kv_heads), ("value", llm.num_kv_heads)):
        letter = f"{theirs}.self_attn.{name[0]}"
        layer.append(Row(f"{ours}/{name}/kernel", f"{letter}_proj.weight", "heads_out", heads))
        if llm.qkv_bias:
            layer.append(Row(f"{ours}/{name}/bias", f"{letter}_proj.bias", "heads_bias", heads))
        if llm.qk_norm and name != "value":
            layer.append(Row(f"{ours}/{name}_norm/scale", f"{letter}_norm.weight"))
    head = [] if llm.tie_embeddings else [Row("lm_head", HEAD, "linear")]
    return [
        Row("embedding", EMBEDDING),
        Row("norm/scale", "model.norm.weight"),
        *head,
        *weight_map.numbered(layer, llm.depth),
    ]


def from_hf(llm: Llama, tensors: Mapping[str, np.ndarray], prefix: str = "") -> dict:
    """Returns the parameters of a scanned model from the tensors whose names start with `prefix`, in their dtypes.

    A file may also hold the head of a tied model, which must equal the embedding, and the rotary frequencies (in old
    files).

    Raises:
      UserError: names are missing or left over (the message lists both), or the head of a tied model differs.
    """
    tensors = weight_map.within(tensors, prefix)
    if not any(name.startswith("model.layers.") for name in tensors):
        raise UserError(f"no {type(llm).__name__} layers here: no name starts with '{prefix}model.layers.'")
    if llm.tie_embeddings and HEAD in tensors and not np.array_equal(tensors[HEAD], tensors[EMBEDDING]):
        raise UserError(f"{prefix}{HEAD} differs from {prefix}{EMBEDDING}, but a model of this size ties them")
    dropped = ("rotary_emb.inv_freq", *[HEAD] * llm.tie_embeddings)
    kept = weight_map.View(tensors, {name: name for name in tensors if not name.endswith(dropped)})
    return stacking.stack_layers(weight_map.from_torch(rows(llm), kept, llm.num_heads))


def to_hf(llm: Llama, params: Mapping, prefix: str = "") -> Tensors:
    """The inverse of `from_hf`. It also writes the head of a tied model, as Hugging Face's state dict does."""
    tensors = weight_map.to_torch(rows(llm), stacking.unstack_layers(dict(params)))
    return {prefix + name: x for name, x in (tensors | {HEAD: tensors.get(HEAD, tensors[EMBEDDING])}).items()}


def hf_config(llm: Llama) -> dict:
    """Returns the fields of transformers' config, without its type."""
    rope = {"rope_type": "default", "rope_theta": llm.rope_theta}
    if scaling := llm.rope_scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.original_length,
        }
    return dict(
        hidden_size=llm.width,
        num_hidden_layers=llm.depth,
        num_attention_heads=llm.num_heads,
        num_key_value_heads=llm.num_kv_heads,
        head_dim=llm.head_dim or llm.width // llm.num_heads,
        intermediate_size=llm.ffn,
        vocab_size=llm.vocab_size,
        rms_norm_eps=llm.norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=llm.tie_embeddings,
    )
