"""Weights of the Q-Former, under the names of published BLIP-2 checkpoints (LAVIS) or of a BERT."""

from collections.abc import Mapping

import jax
import numpy as np

from simvlg_jax.convert import bert, blip2_names, weight_map
from simvlg_jax.convert.own_files import own_tree
from simvlg_jax.convert.tensor_files import open_tensors, resolve
from simvlg_jax.convert.weight_map import Row
from simvlg_jax.models.connectors.qformer import QFormer
from simvlg_jax.utils.errors import warn
from simvlg_jax.utils.packages import minilm_folder

LAYER = "Qformer.bert.encoder.layer.{i}"
TEXT_PARTS = ("mlp", "mlp_norm")  # of a layer
LN_VISION = weight_map.layer_norm("ln_vision", "ln_vision")


def rows(connector: QFormer, text: bool = False) -> list[Row]:
    """Returns a row for every parameter, with its name in LAVIS's checkpoints. `text`: also for the text's MLPs."""
    table = [
        Row("query_tokens", "query_tokens"),
        *weight_map.layer_norm("norm", "Qformer.bert.embeddings.LayerNorm"),
    ]
    for i in range(connector.depth):
        layer = bert.attention_rows("layer_{i}", f"{LAYER}.attention")
        if i % connector.cross_every == 0:
            layer += bert.attention_rows("layer_{i}", f"{LAYER}.crossattention", "cross_")
        layer += bert.feed_forward_rows("layer_{i}", LAYER, "query_", "_query")
        if text:
            layer += bert.feed_forward_rows("layer_{i}", LAYER)
        table += [row._replace(ours=row.ours.format(i=i), torch=row.torch.format(i=i)) for row in layer]
    return table


def load(name: str, connector: QFormer) -> dict:
    """Returns {"connector": parameters, "ln_vision": those of the norm before it, if the file has them}.

    Of an aligned first stage of ours come also "llm_proj".

    The file is of BLIP-2 (either stage: LAVIS's, Hugging Face's or ours) or a BERT. A text branch, which a captioner
    lacks, is left out, and a warning says so. Of a BERT come the LayerNorm and the self-attention, as published; the
    queries, their MLPs and the cross-attention then start from random numbers.
    """
    tensors = open_tensors(minilm_folder() if name == "minilm" else resolve(name))
    if own := own_tree(tensors):
        parts = ("connector", "ln_vision", *["llm_proj"] * ("word" in own))  # a whole model's is of its own LLM
        loaded = {part: own[part] for part in parts if part in own} or {"connector": own}
    else:
        tensors = blip2_names.as_lavis(tensors)
        loaded = _of_blip2(tensors, connector) if "query_tokens" in tensors else _of_bert(tensors, connector)
    layers = {layer: tree for layer, tree in loaded["connector"].items() if layer.startswith("layer_")}
    kept = {layer: {part: x for part, x in tree.items() if part not in TEXT_PARTS} for layer, tree in layers.items()}
    if any(len(kept[layer]) < len(tree) for layer, tree in layers.items()):
        warn(f"{name}: the text branch of its Q-Former is left out, since a captioner has none")
    loaded["connector"] = loaded["connector"] | kept
    return jax.tree.map(lambda x: x.astype(np.float32), loaded)


def _of_blip2(tensors: Mapping[str, np.ndarray], connector: QFormer) -> dict:
    text = any(name.startswith(f"{LAYER.format(i=0)}.intermediate.") for name in tensors)
    table = [*weight_map.below("connector", rows(connector, text)), *LN_VISION]
    others = [name for name in tensors if not name.startswith("Qformer.bert.encoder.")]
    return weight_map.from_torch(table, tensors, connector.num_heads, others)


def _of_bert(tensors: Mapping[str, np.ndarray], connector: QFormer) -> dict:
    table = [
        *weight_map.layer_norm("norm", "embeddings.LayerNorm"),
        *weight_map.numbered(bert.attention_rows("layer_{i}", "encoder.layer.{i}.attention"), connector.depth),
    ]
    tensors = bert.current_names(tensors)
    return {"connector": weight_map.from_torch(table, tensors, connector.num_heads, list(tensors))}
