"""Pre-trained weights and tokenizers by the names a config gives them.

A name is a package of the example ("minilm", "smollm2"), a local file or folder in any format that `convert` reads, or
a model on the Hugging Face Hub. "" stands for random weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from simvlg_jax.convert import bert, evlgen, gguf, hf_llama, hf_opt, stacking, vision
from simvlg_jax.convert.tensor_files import open_tensors, resolve
from simvlg_jax.data import text
from simvlg_jax.errors import UserError
from simvlg_jax.models.bert import BERT_SIZES
from simvlg_jax.models.llama import LLAMA_SIZES, Llama
from simvlg_jax.models.opt import Opt
from simvlg_jax.models.simvlg import SimVLG
from simvlg_jax.models.vit import ViT


def own_tree(tensors: Mapping[str, np.ndarray]) -> dict | None:
    """The nested tree of a file that `weights.write_tree` wrote, known by the "/" in its names; None of another."""
    if not any("/" in name for name in tensors):
        return None
    return traverse_util.unflatten_dict({name: tensors[name] for name in tensors}, sep="/")


def load_vit(name: str, model: ViT) -> dict:
    """A vision encoder's parameters: a file that `configs/openmoji.py:vit` wrote, or a published one."""
    tensors = open_tensors(resolve(name))
    params = own_tree(tensors) or vision.vit_from_torch(tensors, model.depth, model.num_heads, model.num_tokens)
    return params if model.scan else stacking.unstack_layers(params)


def load_bert(name: str, size_name: str) -> dict:
    """A BERT's parameters for the connector."""
    size = BERT_SIZES[size_name]
    path = bert.minilm_folder() if name == "minilm" else resolve(name)
    return own_tree(open_tensors(path)) or bert.load_bert(path, size["depth"], size["num_heads"], words=False)


def load_sentence_encoder(sentence: ConfigDict) -> dict:
    """The frozen sentence encoder's parameters, words included."""
    name, size = sentence.weights, BERT_SIZES[sentence.size]
    path = bert.minilm_folder() if name == "minilm" else resolve(name)
    return bert.load_bert(path, size["depth"], size["num_heads"], words=True, pooler=sentence.pooling == "pooler")


def load_sentence_tokenizer(name: str) -> Tokenizer:
    """The sentence encoder's WordPiece tokenizer, from beside its weights."""
    return text.minilm_tokenizer() if name == "minilm" else load_hf_tokenizer(resolve(name)).backend_tokenizer


def load_llm(name: str, model: Llama | Opt) -> dict:
    """A language model's parameters; a vocabulary short of the model's gets rows of zeros (Vicuna's pad token)."""
    path = gguf.smollm2_path() if name == "smollm2" else resolve(name)
    if path.suffix == ".gguf":
        params = gguf.load_llama(path)[1]
    else:
        read, tensors = hf_opt.from_hf if isinstance(model, Opt) else hf_llama.from_hf, open_tensors(path)
        params = own_tree(tensors) or read(tensors, model.num_heads)
    missing = model.vocab_size - len(params["embedding"])
    if missing == 1:
        params["embedding"] = params["embedding"].apply(lambda x: np.pad(x, [(0, 1), (0, 0)]))
        if "lm_head" in params:
            params["lm_head"] = params["lm_head"].apply(lambda x: np.pad(x, [(0, 0), (0, 1)]))
    return params if model.scan else stacking.unstack_layers(params)


def load_published(name: str, model: SimVLG) -> dict:
    """Whatever a published SimVLG/EVLGen checkpoint holds: the trained part, or more."""
    tensors = open_tensors(resolve(name))
    params = own_tree(tensors) or evlgen.from_evlgen(model, tensors)
    for module in ("vit", "llm"):
        if module in params and not getattr(model, module).scan:
            params[module] = stacking.unstack_layers(params[module])
    return params


class TokenIds(NamedTuple):
    """A language model's tokenizer, and the ids that start, end and fill up a caption."""

    tokenizer: Tokenizer
    start_id: int
    end_id: int
    pad_id: int


def load_text(config: ConfigDict) -> TokenIds:
    """Tokens as the model was published with: OPT ends a caption with a line break, Vicuna starts it with its EOS.

    Other models of the LLaMA family start with BOS, or EOS if they have none, and end with EOS. Without weights, a
    token for each character.
    """
    name, size = config.llm.tokenizer or config.llm.weights, config.llm.size
    if not name:
        tokenizer = text.character_tokenizer()
        pad, start, end = map(tokenizer.token_to_id, ("<pad>", "<s>", "</s>"))
        return TokenIds(tokenizer, start, end, pad)
    path = gguf.smollm2_path() if name == "smollm2" else resolve(name)
    if path.suffix == ".gguf":
        tokenizer, special = gguf.load_tokenizer(path)
        start = special.eos_id if special.bos_id is None else special.bos_id
        return TokenIds(tokenizer, start, special.eos_id, special.pad_id)
    found = load_hf_tokenizer(path)
    bos, eos, pad = found.bos_token_id, found.eos_token_id, found.pad_token_id
    if eos is None:
        raise UserError(f"the tokenizer in {path} names no eos_token, so captions would have no end")
    tokenizer = found.backend_tokenizer
    if size.startswith("opt"):
        return TokenIds(tokenizer, bos, tokenizer.encode("\n", add_special_tokens=False).ids[0], pad)
    if size.startswith("vicuna"):
        return TokenIds(tokenizer, eos, eos, LLAMA_SIZES[size]["vocab_size"] - 1)  # the row added for padding
    return TokenIds(tokenizer, eos if bos is None else bos, eos, eos if pad is None else pad)


def load_hf_tokenizer(path: Path):
    """transformers' fast tokenizer of a folder.

    Raises:
      UserError: the folder has none.
    """
    import logging

    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"no tokenizer of a known kind in {path}: {reason}") from error
