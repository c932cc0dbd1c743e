"""Encodes captions as token ids and targets.

The data pipeline calls a picklable `TextEncoder` on each caption: `CaptionText` for the language model, `SentenceText`
for the sentence encoder of the contrastive loss.
"""

import string
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from simvlg_jax.utils.errors import UserError

IGNORE = -100  # target at positions without loss
PAD, START, END = "<pad>", "<s>", "</s>"  # of the character tokenizer


@dataclass(frozen=True)
class TextEncoder:
    """Encodes a text as `prefix` + prompt + tokens + `end`, truncated to `max_tokens`.

    Attributes:
      tokenizer: a `tokenizers.Tokenizer` that neither pads nor truncates.
      prefix: ids before the text (start token, prompt).
      end: id after the text.
      pad_id: id that pads a batch; it is masked.
      max_tokens: maximum length, including prefix and end.
      prefix_targets: for each id of the prefix, whether it is a target.
      text_is_target: whether the text and the end are targets.
      keep_end: whether a text that is too long keeps its end and loses its last tokens instead.
    """

    tokenizer: Tokenizer
    prefix: tuple[int, ...]
    end: int
    pad_id: int
    max_tokens: int
    prefix_targets: tuple[bool, ...]
    text_is_target: bool
    keep_end: bool

    def __call__(self, text: str, prompt: str = "") -> tuple[list[int], list[int]]:
        """Returns ids and targets of equal length; each target is the id at its own position, or IGNORE.

        If all is longer than `max_tokens`, the prompt loses tokens on its left before the text loses any on its right.
        Its last tokens stay, as many as fill a quarter of `max_tokens`. (The published code cuts the question's right
        side, and with it "Short answer:".)

        Args:
          prompt: what the text continues, after `prefix`; never a target. A space separates the two.
        """
        prompt_tokens, tokens = self._tokenize(prompt, text)
        room = self.max_tokens - len(self.prefix) - len(tokens) - 1
        prompt_tokens = _last(prompt_tokens, max(room, self.max_tokens // 4))
        if self.keep_end:
            tokens = tokens[: max(0, self.max_tokens - len(self.prefix) - len(prompt_tokens) - 1)]
        before = [*self.prefix, *prompt_tokens]
        flags = [False] * len(before) if prompt_tokens else self.prefix_targets
        ids = [*before, *tokens, self.end]
        trained = [*flags, *[self.text_is_target] * (len(tokens) + 1)]
        targets = [token if train else IGNORE for token, train in zip(ids, trained, strict=True)]
        return ids[: self.max_tokens], targets[: self.max_tokens]

    def prompt_ids(self, prompt: str) -> list[int]:
        """The prefix and a prompt as a model reads them before it writes: the ids that training puts before a text."""
        tokens, _ = self._tokenize(prompt, "")
        return [*self.prefix, *_last(tokens, self.max_tokens - len(self.prefix) - 1)]

    def token_text(self, token: int) -> str:
        """The text of one token, special tokens included."""
        return self.tokenizer.decode([token], skip_special_tokens=False) or self.tokenizer.id_to_token(token) or ""

    def _tokenize(self, prompt: str, text: str) -> tuple[list[int], list[int]]:
        """The tokens of "PROMPT TEXT", cut in two where the text begins; the space between them belongs to the text."""
        prompt = prompt.rstrip(" ")  # or some tokenizers would make a token of the space, and others none
        if not prompt:
            return [], self.tokenizer.encode(text, add_special_tokens=False).ids
        between = " " if text and not prompt[-1:].isspace() else ""
        encoding = self.tokenizer.encode(prompt + between + text, add_special_tokens=False)
        border = next((i for i, (_, end) in enumerate(encoding.offsets) if end > len(prompt)), len(encoding.ids))
        return encoding.ids[:border], encoding.ids[border:]


def _last(ids: list[int], count: int) -> list[int]:
    return ids[max(0, len(ids) - count) :]


def _plain(tokenizer: Any) -> Tokenizer:
    """Copies a `Tokenizer`, or the one in a fast tokenizer of transformers, without padding and truncation."""
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy


class CaptionText(TextEncoder):
    """Text of the language model: start, prompt, caption, end.

    A truncated caption has no end token, so that the model does not learn to stop in mid-sentence.
    """

    def __init__(
        self,
        tokenizer: Any,
        start_id: int | None,
        end_id: int,
        pad_id: int,
        max_tokens: int,
        start_is_target: bool,
        prompt: str = "",
    ):
        """Args:
        tokenizer: `tokenizers.Tokenizer`, or a fast tokenizer of transformers.
        start_id: token before the text; None if the model has none.
        end_id: token after the caption; always a target.
        pad_id: pads a batch.
        max_tokens: maximum length, including the start.
        start_is_target: whether the last visual token is trained to predict the start token. Published: for OPT, not
          for Vicuna, and never with a prompt.
        prompt: fixed text before each caption; never a target.

        Raises UserError if `max_tokens` leaves no room for a caption.
        """
        plain = _plain(tokenizer)
        start = () if start_id is None else (start_id,)
        prompt_ids = tuple(plain.encode(prompt, add_special_tokens=False).ids)
        prefix = start + prompt_ids
        if len(prefix) >= max_tokens:
            raise UserError(
                f"{max_tokens} text tokens leave no room for a caption: start and prompt take {len(prefix)}", status=2
            )
        flags = (start_is_target and not prompt_ids,) * len(start) + (False,) * len(prompt_ids)
        super().__init__(plain, prefix, end_id, pad_id, max_tokens, flags, text_is_target=True, keep_end=False)


class SentenceText(TextEncoder):
    """Input of a sentence encoder, [CLS] text [SEP], without targets; a truncated text keeps its [SEP]."""

    def __init__(self, tokenizer: Any, max_tokens: int):
        """The tokenizer has the tokens [CLS], [SEP] and [PAD], as BERT's, or <s>, </s> and <pad>."""
        plain = _plain(tokenizer)
        known = [
            [plain.token_to_id(token) for token in tokens]
            for tokens in (("[CLS]", "[SEP]", "[PAD]"), (START, END, PAD))
        ]
        start, end, pad = next(ids for ids in known if None not in ids)
        super().__init__(plain, (start,), end, pad, max_tokens, (False,), text_is_target=False, keep_end=True)


def character_tokenizer() -> Tokenizer:
    """A tokenizer without files: <pad> 0, <s> 1, </s> 2, then one token for each printable ASCII character.

    Other characters become "?".
    """
    printable = string.digits + string.ascii_letters + string.punctuation + " "
    vocabulary = {token: i for i, token in enumerate([PAD, START, END, *printable])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([PAD, START, END])
    return tokenizer
