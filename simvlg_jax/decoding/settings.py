"""How texts are decoded: the options of transformers' `generate`, under the same names where it has one."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ml_collections import ConfigDict

from simvlg_jax.utils.errors import UserError


@dataclass(frozen=True)
class Decoding:
    """Options of decoding, hashable so that a jitted function can depend on them.

    Attributes:
      max_new_tokens: maximum number of tokens, the end token included, prefix and prompt not.
      min_new_tokens: number of tokens before the end token may be chosen.
      num_beams: above 1: beam search.
      length_penalty: a beam's score is its log probability divided by its length to this power; 0: plain sums.
      repetition_penalty: logits of generated tokens are divided by it if positive, multiplied if negative (CTRL, arXiv
        1909.05858). Prefix and prompt do not count.
      do_sample: draws tokens instead of taking the most likely ones. Not together with beams.
      temperature: divides the logits before sampling.
      top_k: sampling is from so many most likely tokens; 0: from all.
      top_p: sampling is from the fewest most likely tokens that together have this probability (nucleus sampling).
      num_captions: texts for each picture: that many samples, or the best beams.
      count_bos: counts as transformers 4.31 did for the published results, where generation began with a start token
        that the model never saw: lengths include it, and the repetition penalty applies to it.

    Raises UserError (status 2) if options contradict each other.
    """

    max_new_tokens: int = 30
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_captions: int = 1
    count_bos: bool = False

    def __post_init__(self):
        problems = {
            "max_new_tokens must be at least 1": self.max_new_tokens < 1,
            "max_new_tokens must be at least 2 with count_bos, which counts the start": self.max_tokens < 1,
            "num_beams must be at least 1": self.num_beams < 1,
            "do_sample draws tokens and num_beams above 1 searches; choose one": self.do_sample and self.num_beams > 1,
            "temperature must be above 0; do_sample=False takes the most likely token": self.temperature <= 0,
            "top_p must be above 0 and at most 1": not 0 < self.top_p <= 1,
            "num_captions must be at least 1": self.num_captions < 1,
            "num_captions above 1 needs do_sample=True or as many num_beams": not self.do_sample
            and self.num_captions > self.num_beams,
        }
        for problem, holds in problems.items():
            if holds:
                raise UserError(problem, 2)

    @property
    def max_tokens(self) -> int:
        """Maximum number of new tokens."""
        return self.max_new_tokens - self.count_bos

    @property
    def min_tokens(self) -> int:
        """Number of new tokens before the end token may be chosen."""
        return self.min_new_tokens - self.count_bos


def decoding_of(config: ConfigDict, changes: Mapping[str, object] = MappingProxyType({})) -> Decoding:
    """The options in `config.evaluate`, with changes."""
    return Decoding(**{name: config.evaluate[name] for name in Decoding.__dataclass_fields__} | changes)
