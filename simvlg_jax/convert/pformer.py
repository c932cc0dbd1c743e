"""P-Former's weights, under the names of BLIText's stage-0 checkpoints, of a BERT, or in our own file."""

from collections.abc import Mapping

import jax
import numpy as np

from simvlg_jax.convert import bert, weight_map
from simvlg_jax.convert.own_files import own_tree
from simvlg_jax.convert.tensor_files import open_tensors, resolve
from simvlg_jax.convert.weight_map import Row
from simvlg_jax.models.pformer import PFormer
from simvlg_jax.utils.packages import minilm_folder

PREFIXES = ("Pformer.", "Darkformer.")  # of the published code, and of its logged runs
ABSENT = ("cls_proj", "pooler", "prompt_proj")  # parts that a BERT lacks


def rows(model: PFormer) -> list[Row]:
    """Returns a row for every trained parameter of `PromptLearner`, with its published name after "Pformer."."""
    return [
        *weight_map.below("pformer/encoder", bert.encoder_rows(model.depth)),
        Row("pformer/encoder/word", "embeddings.word_embeddings.weight"),
        *weight_map.linear("pformer/cls_proj", "cls_proj"),
        *weight_map.linear("pformer/pooler", "pooler.0"),
        *weight_map.linear("pformer/prompt_proj", "opt_proj"),
        *weight_map.linear("text_proj", "text_proj"),
        Row("temperature", "temp"),
    ]


def load(name: str, model: PFormer) -> dict:
    """Returns {top-level name: parameters} of a file. A BERT only has pformer/encoder, and the rest starts anew.

    Raises:
      UserError: the file cannot be read, or names are missing or left over.
    """
    path = minilm_folder() if name == "minilm" else resolve(name)
    tensors = open_tensors(path)
    if own := own_tree(tensors):
        return own
    if any(name.startswith(PREFIXES) for name in tensors):
        return jax.tree.map(lambda x: x.astype(np.float32), of_blitext(model, tensors))
    return {"pformer": {"encoder": bert.load_bert(path, model.depth, model.num_heads, words=True)}}


def of_blitext(model: PFormer, tensors: Mapping[str, np.ndarray]) -> dict:
    """Returns the parameters of a checkpoint of BLIText. Its copy of the language model's embedding is left out."""
    prefix = next(prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in tensors))
    return weight_map.from_torch(
        rows(model), weight_map.within(tensors, prefix), model.num_heads, ("embeddings.position_ids",)
    )
