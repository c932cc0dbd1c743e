"""Loads pre-trained weights by the names that a config has for them.

A name is a package of the example ("minilm", "smollm2"), a local file or folder in any format that `convert` reads, or
a model on the Hugging Face Hub. The caller handles "", which stands for random weights.
"""

import flax.linen as nn
import numpy as np
from ml_collections import ConfigDict

from simvlg_jax.convert import bert, blip2_names, encoders, evlgen, families, stacking
from simvlg_jax.convert.own_files import own_tree
from simvlg_jax.convert.tensor_files import open_tensors, resolve
from simvlg_jax.models.bert import BERT_SIZES
from simvlg_jax.models.encoders.vit import ViT
from simvlg_jax.models.simvlg import SimVLG
from simvlg_jax.utils.errors import UserError
from simvlg_jax.utils.packages import minilm_folder, smollm2_path


def load_vit(name: str, model: ViT) -> dict:
    """Returns a vision encoder's parameters from a file of ours, of it alone or a whole model, or a published one."""
    tensors = open_tensors(resolve(name))
    params = own_tree(tensors, "vit") or encoders.of_model(model).from_torch(model, tensors)
    return params if model.scan else stacking.unstack_layers(params)


def load_sentence_encoder(sentence: ConfigDict) -> dict:
    """Returns the frozen sentence encoder's parameters, with the word embeddings."""
    name, size = sentence.weights, BERT_SIZES[sentence.size]
    path = minilm_folder() if name == "minilm" else resolve(name)
    return bert.load_bert(path, size["depth"], size["num_heads"], words=True, pooler=sentence.pooling == "pooler")


def load_llm(name: str, llm: nn.Module) -> dict:
    """Returns a language model's parameters. Tokens that its family adds to the original ones get rows of zeros."""
    family = families.of_model(llm)
    path = smollm2_path() if name == "smollm2" else resolve(name)
    if path.suffix != ".gguf":
        tensors = open_tensors(path)
        params = own_tree(tensors) or family.from_hf(llm, tensors)
    elif family.from_gguf:
        params = family.from_gguf(path, llm)
    else:
        raise UserError(f"{path}: a model of this llm.size is read from Hugging Face's files, not from GGUF")
    added = family.added_tokens
    if added and len(params["embedding"]) == llm.vocab_size - added:
        params["embedding"] = params["embedding"].apply(lambda x: np.pad(x, [(0, added), (0, 0)]))
        if "lm_head" in params:
            params["lm_head"] = params["lm_head"].apply(lambda x: np.pad(x, [(0, 0), (0, added)]))
    return params if llm.scan else stacking.unstack_layers(params)


def load_published(name: str, model: SimVLG) -> dict:
    """Returns all parameters that a checkpoint holds.

    It is a published one of SimVLG/EVLGen or BLIP-2, an exported file or "example".
    """
    tensors = open_tensors(resolve(name))
    params = own_tree(tensors) or evlgen.from_evlgen(model, tensors)
    if blip2_names.is_hugging_face(tensors) and "llm" in params:
        llm, size = (
            params["llm"],
            model.llm.vocab_size,
        )  # newer files have more rows, since a token stands for a picture
        llm["embedding"] = llm["embedding"][:size]
        if "lm_head" in llm:
            llm["lm_head"] = llm["lm_head"][:, :size]
    for module in ("vit", "llm"):
        if module in params and not getattr(model, module).scan:
            params[module] = stacking.unstack_layers(params[module])
    return params
