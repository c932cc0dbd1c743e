"""The table of language-model families: all that depends on the family, except its module itself."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
from tokenizers import Tokenizer

from simvlg_jax.convert import gguf, llama, opt
from simvlg_jax.convert.gguf import SpecialIds
from simvlg_jax.convert.weight_map import Tensors
from simvlg_jax.models.llms.llama import LLAMA_SIZES, Llama
from simvlg_jax.models.llms.opt import OPT_SIZES, Opt
from simvlg_jax.models.llms.qwen import QWEN2_SIZES, QWEN3_SIZES, Qwen2, Qwen3
from simvlg_jax.models.llms.vicuna import VICUNA_SIZES, Vicuna
from simvlg_jax.utils.errors import UserError


class CaptionIds(NamedTuple):
    """The token ids that start, end and fill up a caption."""

    start: int
    end: int
    pad: int


def llama_ids(tokenizer: Tokenizer, special: SpecialIds, size: Mapping) -> CaptionIds:
    """A caption starts with BOS, or with EOS if there is no BOS, and ends with EOS."""
    start = special.eos_id if special.bos_id is None else special.bos_id
    return CaptionIds(start, special.eos_id, special.pad_id)


def opt_ids(tokenizer: Tokenizer, special: SpecialIds, size: Mapping) -> CaptionIds:
    """BOS starts a caption and a line break ends it, as published."""
    end = tokenizer.encode("\n", add_special_tokens=False).ids[0]
    return CaptionIds(special.bos_id, end, special.pad_id)


def vicuna_ids(tokenizer: Tokenizer, special: SpecialIds, size: Mapping) -> CaptionIds:
    """EOS starts and ends a caption, as published. The token that is added to the vocabulary pads it."""
    return CaptionIds(special.eos_id, special.eos_id, size["vocab_size"] - 1)


class Family(NamedTuple):
    """Language models of one architecture whose captions start and end in the same way.

    Attributes:
      module: their Linen module. No other family has it.
      sizes: name, a value of `config.llm.size` -> fields of the module.
      from_hf: (model, tensors, prefix of their names, "" by default) -> the scanned model's parameters.
      to_hf: (model, parameters, prefix) -> tensors, as Hugging Face's state dict has them.
      hf_config: model -> fields of transformers' config, "tie_word_embeddings" among them.
      hf_type: the "model_type" of transformers' config.
      caption_ids: (tokenizer, its special ids, fields of the size) -> the ids of a caption.
      from_gguf: (file, model) -> the scanned model's parameters; None if GGUF files are not supported.
      evlgen: the first word in the published names of the model and of its projection.
      added_tokens: number of tokens at the end of the vocabulary that the original weights lack.
    """

    module: type[nn.Module]
    sizes: dict[str, dict]
    from_hf: Callable[..., dict]
    to_hf: Callable[..., Tensors]
    hf_config: Callable[[nn.Module], dict]
    hf_type: str
    caption_ids: Callable[[Tokenizer, SpecialIds, Mapping], CaptionIds] = llama_ids
    from_gguf: Callable[[Path, nn.Module], dict] | None = None
    evlgen: str = "llm"
    added_tokens: int = 0


LLAMA = (llama.from_hf, llama.to_hf, llama.hf_config)
FAMILIES = {
    "opt": Family(Opt, OPT_SIZES, opt.from_hf, opt.to_hf, opt.hf_config, "opt", opt_ids, evlgen="opt"),
    "llama": Family(Llama, LLAMA_SIZES, *LLAMA, "llama", from_gguf=gguf.load_llama),
    "vicuna": Family(Vicuna, VICUNA_SIZES, *LLAMA, "llama", vicuna_ids, gguf.load_llama, added_tokens=1),
    "qwen2.5": Family(Qwen2, QWEN2_SIZES, *LLAMA, "qwen2"),
    "qwen3": Family(Qwen3, QWEN3_SIZES, *LLAMA, "qwen3"),
}


def of_size(size: str) -> Family:
    """Returns the family of a `config.llm.size`.

    Raises:
      UserError (status 2): no family has this size.
    """
    known = {name: family for family in FAMILIES.values() for name in family.sizes}
    if size not in known:
        raise UserError(f"llm.size is {size!r}; it takes {', '.join(map(repr, known))}", 2)
    return known[size]


def of_model(llm: nn.Module) -> Family:
    """Returns the family of a language model."""
    return next(family for family in FAMILIES.values() if family.module is type(llm))
