"""Base forms of the words of an answer, as the published evaluation of OK-VQA has them: "cats" becomes "cat"."""

from collections.abc import Callable, Iterable
from typing import Protocol

from simvlg_jax.utils.errors import UserError

MODEL = "en_core_web_sm"
LEMMATISED = ("NOUN", "VERB")  # the kinds of words; all others stay as they are


class Token(Protocol):
    """A word as spaCy gives it."""

    text: str
    pos_: str
    lemma_: str


Nlp = Callable[[str], Iterable[Token]]


def load_nlp(key: str) -> Nlp:
    """Returns spaCy's English model.

    Args:
      key: of the config, for messages.

    Raises:
      UserError: spaCy or the model is not installed.
    """
    try:
        import spacy  # Late: it is optional.
    except ImportError as error:
        raise UserError(f"{key} needs spaCy: pip install 'simvlg_jax[lemmas]'") from error
    try:
        return spacy.load(MODEL)
    except OSError as error:
        raise UserError(f"{key} needs the model {MODEL} of spaCy: python -m spacy download {MODEL}") from error


def lemmatise(answer: str, nlp: Nlp) -> str:
    """Replaces nouns and verbs by their base forms; one space separates all words."""
    return " ".join(token.lemma_ if token.pos_ in LEMMATISED else token.text for token in nlp(answer))
