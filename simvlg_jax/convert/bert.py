"""BERT weights from Hugging Face names, for the connector and for the sentence encoder."""

from pathlib import Path

import jax
import numpy as np

from simvlg_jax.convert import weight_map
from simvlg_jax.convert.tensor_files import open_tensors
from simvlg_jax.convert.weight_map import Row


def layer_rows(ours: str, torch: str) -> list[Row]:
    """One encoder layer, as `models.bert.BertLayer` holds it."""
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
    """Embeddings without words, and `depth` layers: what the connector uses."""
    return [
        Row("embeddings/position", f"{prefix}embeddings.position_embeddings.weight"),
        Row("embeddings/token_type", f"{prefix}embeddings.token_type_embeddings.weight"),
        *weight_map.layer_norm("embeddings/norm", f"{prefix}embeddings.LayerNorm"),
        *weight_map.numbered(layer_rows("layer_{i}", prefix + "encoder.layer.{i}"), depth),
    ]


def load_bert(path: Path, depth: int, num_heads: int, words: bool, pooler: bool = False) -> dict:
    """A BERT from anything `open_tensors` opens, as our nested float32 tree.

    Of a deeper BERT the first `depth` layers are used. Names with "bert." before them and the old names of
    LayerNorm's parameters (gamma, beta) are known.

    Args:
      words: include the word embeddings.
      pooler: include the layer on the class token.

    Raises:
      UserError: a file that cannot be read; names missing or left over.
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
