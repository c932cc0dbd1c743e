"""Caption scores over a corpus: BLEU-1..4, ROUGE-L and CIDEr, with the numbers of the COCO caption evaluation.

The three are short, so they are implemented here: pycocoevalcap, their reference, installs 100 MB of Java programs
and data. The tests compare with its numbers. METEOR and SPICE are in `java`.

Scale: fractions. BLEU and ROUGE-L are in 0..1, CIDEr in 0..10. "CIDEr 139.1" in papers is 1.391 here.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simvlg_jax.evaluation.scores.cider import ORDERS, Cider, Ngrams, ngrams_of, of_order
from simvlg_jax.evaluation.scores.control import derangement
from simvlg_jax.evaluation.scores.ptb_tokenizer import tokenize

_ROUGE_BETA = 1.2  # weight of recall against precision


@dataclass(frozen=True)
class CaptionScores:
    """Scores of one set of captions; `cider_per_example` averages to `cider`."""

    bleu_1: float
    bleu_2: float
    bleu_3: float
    bleu_4: float
    rouge_l: float
    cider: float
    cider_per_example: dict[str, float]

    def as_dict(self) -> dict[str, float]:
        """Returns the corpus scores with their usual names, for logs and tables."""
        bleus = (self.bleu_1, self.bleu_2, self.bleu_3, self.bleu_4)
        names = {f"BLEU-{n}": score for n, score in zip(ORDERS, bleus, strict=True)}
        return {**names, "ROUGE-L": self.rouge_l, "CIDEr": self.cider}


def score_captions(references: dict[str, list[str]], hypotheses: dict[str, str]) -> CaptionScores:
    """Scores one caption per picture against the references of that picture.

    BLEU is a corpus score: n-gram counts and lengths are summed over pictures before the division. ROUGE-L and CIDEr
    are means over pictures. CIDEr weights n-grams by their inverse document frequency in `references`, so the score of
    a picture depends on the other pictures, and a corpus of one picture always scores 0. Captions are tokenised here
    (see `ptb_tokenizer`). An empty caption scores 0 and counts towards BLEU's brevity penalty.

    Args:
      references: {picture: one or more captions}, in the order in which the tokeniser reads them.
      hypotheses: {picture: caption}, with the same keys.

    Raises:
      ValueError: the keys differ, there is no picture, or a picture has no reference.
    """
    return _score(*tokenized(references, hypotheses))


def shuffled_control(references: dict[str, list[str]], hypotheses: dict[str, str], seed: int) -> dict[str, float]:
    """Scores each caption against the references of another picture, as a model that ignores pictures would score.

    `derangement(len(references), seed)` assigns the captions. A model that ignores pictures scores as high here as
    against the right references. The ratio of the two scores measures how far captions depend on pictures.

    Returns:
      `CaptionScores.as_dict()` of the shuffled captions; all 0 if there is only one picture.
    """
    references, hypotheses = tokenized(references, hypotheses)
    captions = list(hypotheses.values())
    if len(captions) < 2:
        return dict.fromkeys(_score(references, hypotheses).as_dict(), 0.0)
    order = derangement(len(captions), seed)
    shuffled = {key: captions[i] for key, i in zip(hypotheses, order, strict=True)}
    return _score(references, shuffled).as_dict()


def tokenized(
    references: dict[str, list[str]], hypotheses: dict[str, str]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Returns the references and the hypotheses as tokens with spaces between them; errors as `score_captions`."""
    if references.keys() != hypotheses.keys():
        lone = sorted(references.keys() ^ hypotheses.keys())
        raise ValueError(f"pictures need both references and a caption; these have only one: {lone[:5]}")
    if not references:
        raise ValueError("no captions to score")
    if bare := [key for key, captions in references.items() if not captions]:
        raise ValueError(f"pictures without a reference: {bare[:5]}")
    tokens = iter(tokenize([caption for captions in references.values() for caption in captions]))
    tokenized_references = {key: [next(tokens) for _ in captions] for key, captions in references.items()}
    tokens = tokenize([hypotheses[key] for key in references])
    return tokenized_references, dict(zip(references, tokens, strict=True))


def _score(references: dict[str, list[str]], hypotheses: dict[str, str]) -> CaptionScores:
    hypothesis_ngrams = [ngrams_of(hypotheses[key]) for key in references]
    reference_ngrams = [[ngrams_of(text) for text in texts] for texts in references.values()]
    cider = Cider(reference_ngrams)
    ciders = [cider(*pair) for pair in zip(hypothesis_ngrams, reference_ngrams, strict=True)]
    return CaptionScores(
        *_bleu(hypothesis_ngrams, reference_ngrams),
        rouge_l=float(np.mean([_rouge_l(hypotheses[key], texts) for key, texts in references.items()])),
        cider=float(np.mean(ciders)),
        cider_per_example=dict(zip(references, ciders, strict=True)),
    )


def _bleu(hypotheses: Sequence[Ngrams], references: Sequence[list[Ngrams]]) -> list[float]:
    """Returns BLEU-1..4 with the reference length closest to the caption's (Papineni et al., 2002)."""
    correct, guessed = np.zeros(len(ORDERS)), np.zeros(len(ORDERS))
    length = reference_length = 0
    for hypothesis, texts in zip(hypotheses, references, strict=True):
        words = of_order(hypothesis, 1)
        length += words
        reference_length += min((abs(of_order(text, 1) - words), of_order(text, 1)) for text in texts)[1]
        most: Ngrams = Counter()
        for text in texts:
            most |= text
        for ngram, count in hypothesis.items():
            guessed[len(ngram) - 1] += count
            correct[len(ngram) - 1] += min(count, most[ngram])
    # The published implementation adds the tiny terms, so that precision and brevity are finite if nothing matches.
    log_precision = np.log((correct + 1e-15) / (guessed + 1e-9))
    brevity = min(0.0, 1 - (reference_length + 1e-9) / (length + 1e-15))
    return [float(math.exp(log_precision[:n].mean() + brevity)) for n in ORDERS]


def _rouge_l(hypothesis: str, references: list[str]) -> float:
    """Returns the ROUGE-L F-measure, from the best precision and the best recall over the references (Lin, 2004)."""
    words = hypothesis.split(" ")
    common = [(_common_subsequence(words, text.split(" ")), len(text.split(" "))) for text in references]
    precision = max(shared / len(words) for shared, _ in common)
    recall = max(shared / length for shared, length in common)
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + _ROUGE_BETA**2) * precision * recall / (recall + _ROUGE_BETA**2 * precision)


def _common_subsequence(a: list[str], b: list[str]) -> int:
    """Returns the length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]
