"""Reads BERT weights under Hugging Face's names, for the connector and the sentence encoder."""

from pathlib import Path

import jax
import numpy as np

from simvlg_jax.convert import weight_map
from simvlg_jax.convert.tensor_files import open_tensors
from simvlg_jax.convert.weight_map import Row


def layer_rows(ours: str, torch: str) -> list[Row]:
    """Returns the rows of one `models.bert.BertLayer`."""
    attention = f"{torch}.attention"
    return [
        *weight_map.query_key_value(f"{ours}/query", f"{attention}.self.query"),
        *weight_map.query_key_value(f"{ours}/key", f"{attention}.self.key"),
        *weight_map.query_key_value(f"{ours}/value", f"{attention}.self.value"),
        *weight_map.merge_heads(f"{ours}/attention_out", f"{attention}.output.dense"),
        *weight_map.layer_norm(f"{ours}/attention_norm", f"{attention}.output.LayerNorm"),
        *weight_map.linear(f"{ours}/mlp/fc1", f"{torch}.intermediate.dense"),
        *weight_map.linear(f"{ours}/mlp/fc2", f"{torch}.output.dense"),
        *weight_map.layer_norm(f"{ours}/mlp_norm", f"{torch}.output.LayerNorm"),
    ]


def encoder_rows(depth: int, prefix: str = "") -> list[Row]:
    """Returns the rows that a connector uses: `depth` layers and the embeddings without words."""
    return [
        Row("embeddings/position", f"{prefix}embeddings.position_embeddings.weight"),
        Row("embeddings/token_type", f"{prefix}embeddings.token_type_embeddings.weight"),
        *weight_map.layer_norm("embeddings/norm", f"{prefix}embeddings.LayerNorm"),
        *weight_map.numbered(layer_rows("layer_{i}", prefix + "encoder.layer.{i}"), depth),
    ]


def load_bert(path: Path, depth: int, num_heads: int, words: bool, pooler: bool = False) -> dict:
    """Returns the first `depth` layers and the embeddings of a BERT, as our nested float32 tree.

    Names may start with "bert.", and LayerNorm's parameters may have their old names (gamma, beta).

    Args:
      path: anything that `open_tensors` opens.
      words: whether to include the word embeddings.
      pooler: whether to include the layer on the class token.

    Raises:
      UserError: the file cannot be read, or names are missing or left over.
    """
    tensors = open_tensors(path)
    names = {}
    for name in tensors:
        short = name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
        names[short.replace("LayerNorm.beta", "LayerNorm.bias")] = name
    table = encoder_rows(depth)
    if words:
        table = [*table, Row("word", "embeddings.word_embeddings.weight")]
    if pooler:
        table = [*table, *weight_map.linear("pooler", "pooler.dense")]
    deeper = [n for n in names if n.startswith("encoder.layer.") and int(n.split(".")[2]) >= depth]
    ignore = ["embeddings.position_ids", "embeddings.word_embeddings.", "pooler.", "cls.", *deeper]
    params = weight_map.from_torch(table, weight_map.View(tensors, names), num_heads, ignore)
    return jax.tree.map(lambda x: x.astype(np.float32), params)
