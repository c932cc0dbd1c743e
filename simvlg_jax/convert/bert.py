"""Reads BERT weights under Hugging Face's names, for the connector and the sentence encoder."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from simvlg_jax.convert import weight_map
from simvlg_jax.convert.tensor_files import open_tensors
from simvlg_jax.convert.weight_map import Row


def attention_rows(ours: str, torch: str, prefix: str = "") -> list[Row]:
    """Returns the rows of one `models.bert.attention`. `prefix`: of our names."""
    return [
        *weight_map.query_key_value(f"{ours}/{prefix}query", f"{torch}.self.query"),
        *weight_map.query_key_value(f"{ours}/{prefix}key", f"{torch}.self.key"),
        *weight_map.query_key_value(f"{ours}/{prefix}value", f"{torch}.self.value"),
        *weight_map.merge_heads(f"{ours}/{prefix}attention_out", f"{torch}.output.dense"),
        *weight_map.layer_norm(f"{ours}/{prefix}attention_norm", f"{torch}.output.LayerNorm"),
    ]


def feed_forward_rows(ours: str, torch: str, prefix: str = "", suffix: str = "") -> list[Row]:
    """Returns the rows of one `models.bert.feed_forward`. `prefix`: of our names; `suffix`: of PyTorch's modules."""
    return [
        *weight_map.linear(f"{ours}/{prefix}mlp/fc1", f"{torch}.intermediate{suffix}.dense"),
        *weight_map.linear(f"{ours}/{prefix}mlp/fc2", f"{torch}.output{suffix}.dense"),
        *weight_map.layer_norm(f"{ours}/{prefix}mlp_norm", f"{torch}.output{suffix}.LayerNorm"),
    ]


def layer_rows(ours: str, torch: str) -> list[Row]:
    """Returns the rows of one `models.bert.BertLayer`."""
    return [*attention_rows(ours, f"{torch}.attention"), *feed_forward_rows(ours, torch)]


def encoder_rows(depth: int, prefix: str = "") -> list[Row]:
    """Returns the rows that a connector uses: `depth` layers and the embeddings without words."""
    return [
        Row("embeddings/position", f"{prefix}embeddings.position_embeddings.weight"),
        Row("embeddings/token_type", f"{prefix}embeddings.token_type_embeddings.weight"),
        *weight_map.layer_norm("embeddings/norm", f"{prefix}embeddings.LayerNorm"),
        *weight_map.numbered(layer_rows("layer_{i}", prefix + "encoder.layer.{i}"), depth),
    ]


def current_names(tensors: Mapping[str, np.ndarray]) -> weight_map.View:
    """Returns the tensors under a BERT's names without "bert."; LayerNorm's may have been called gamma and beta."""
    names = {}
    for name in tensors:
        short = name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
        names[short.replace("LayerNorm.beta", "LayerNorm.bias")] = name
    return weight_map.View(tensors, names)


def load_bert(path: Path, depth: int, num_heads: int, words: bool, pooler: bool = False) -> dict:
    """Returns the first `depth` layers and the embeddings of a BERT, as our nested float32 tree.

    Names may be those of older versions, see `current_names`.

    Args:
      path: anything that `open_tensors` opens.
      words: whether to include the word embeddings.
      pooler: whether to include the layer on the class token.

    Raises:
      UserError: the file cannot be read, or names are missing or left over.
    """
    tensors = current_names(open_tensors(path))
    table = encoder_rows(depth)
    if words:
        table = [*table, Row("word", "embeddings.word_embeddings.weight")]
    if pooler:
        table = [*table, *weight_map.linear("pooler", "pooler.dense")]
    deeper = [n for n in tensors if n.startswith("encoder.layer.") and int(n.split(".")[2]) >= depth]
    ignore = ["embeddings.position_ids", "embeddings.word_embeddings.", "pooler.", "cls.", *deeper]
    params = weight_map.from_torch(table, tensors, num_heads, ignore)
    return jax.tree.map(lambda x: x.astype(np.float32), params)
