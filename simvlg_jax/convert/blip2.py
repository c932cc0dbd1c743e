"""Weights of BLIP-2's first stage, under the names of LAVIS's checkpoints, Hugging Face's or a BERT's."""

from collections.abc import Mapping

import jax
import numpy as np

from simvlg_jax.convert import bert, blip2_names, qformer, weight_map
from simvlg_jax.convert.own_files import own_tree
from simvlg_jax.convert.tensor_files import open_tensors, resolve
from simvlg_jax.convert.weight_map import Row
from simvlg_jax.models.blip2 import Blip2
from simvlg_jax.utils.packages import minilm_folder

WORDS = "embeddings.word_embeddings.weight"
POSITIONS = "embeddings.position_embeddings.weight"


def head_rows(prefix: str) -> list[Row]:
    """Returns the rows of the LM head, which is named in LAVIS's checkpoints as in a BERT."""
    return [
        *weight_map.linear("lm_head/dense", f"{prefix}cls.predictions.transform.dense"),
        *weight_map.layer_norm("lm_head/norm", f"{prefix}cls.predictions.transform.LayerNorm"),
        Row("lm_head/bias", f"{prefix}cls.predictions.bias"),
    ]


def rows(model: Blip2) -> list[Row]:
    """Returns a row for every trained parameter, with its name in LAVIS's checkpoints."""
    return [
        *qformer.LN_VISION,
        *weight_map.below("connector", qformer.rows(model.connector, text=True)),
        Row("word", f"Qformer.bert.{WORDS}"),
        Row("position", f"Qformer.bert.{POSITIONS}"),
        *head_rows("Qformer."),
        *(row for name in ("vision_proj", "text_proj", "itm_head") for row in weight_map.linear(name, name)),
        Row("temperature", "temp"),
    ]


def load(name: str, model: Blip2) -> dict:
    """Returns the first parameters that a file has, from a run of ours, from BLIP-2, or from a BERT.

    Of a BERT come the words, positions, layers and LM head. As published, the queries' MLPs start as copies of the
    text's, and the queries and the cross-attention as random numbers. The word [DEC] is added to 30522 words.

    Raises:
      UserError: the file cannot be read, or names are missing or left over.
    """
    tensors = open_tensors(minilm_folder() if name == "minilm" else resolve(name))
    if own := own_tree(tensors):
        return own
    tensors = blip2_names.as_lavis(tensors)
    loaded = _of_blip2(tensors, model) if "query_tokens" in tensors else _of_bert(tensors, model)
    if len(loaded["word"]) == model.vocab_size - 1:
        start = np.random.default_rng(0).normal(0, 0.02, (1, model.connector.width)).astype(np.float32)
        loaded["word"] = loaded["word"].apply(lambda x: np.concatenate([x, start]))
        if "lm_head" in loaded:
            loaded["lm_head"]["bias"] = loaded["lm_head"]["bias"].apply(lambda x: np.pad(x, (0, 1)))
    return jax.tree.map(lambda x: x.astype(np.float32), loaded)


def _of_blip2(tensors: Mapping[str, np.ndarray], model: Blip2) -> dict:
    """Hugging Face's models lack LM head and temperature, which then start anew."""
    table = rows(model)
    if "temp" not in tensors:
        table = [row for row in table if not row.torch.startswith(blip2_names.NOWHERE)]
    tied = ("Qformer.cls.predictions.decoder.", "Qformer.bert.embeddings.position_ids")
    return weight_map.from_torch(table, tensors, model.connector.num_heads, ("visual_encoder.", *tied))


def _of_bert(tensors: Mapping[str, np.ndarray], model: Blip2) -> dict:
    tensors, depth = bert.current_names(tensors), model.connector.depth
    table = [
        *weight_map.layer_norm("connector/norm", "embeddings.LayerNorm"),
        *weight_map.numbered(bert.layer_rows("connector/layer_{i}", "encoder.layer.{i}"), depth),
        Row("word", WORDS),
        Row("position", POSITIONS),
    ]
    heads = head_rows("")
    if all(row.torch in tensors for row in heads):
        table += heads
    loaded = weight_map.from_torch(table, tensors, model.connector.num_heads, list(tensors))
    for i in range(depth):
        layer = loaded["connector"][f"layer_{i}"]
        loaded["connector"][f"layer_{i}"] = {**layer, **{f"query_{part}": layer[part] for part in qformer.TEXT_PARTS}}
    return loaded
