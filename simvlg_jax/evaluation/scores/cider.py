"""CIDEr-D (Vedantam et al., 2015) with the document frequencies of any corpus: of the scored split, or of training."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

ORDERS = (1, 2, 3, 4)
SIGMA = 6.0  # width of the penalty on differences in length, in bigrams

Ngrams = Counter[tuple[str, ...]]


def ngrams_of(text: str) -> Ngrams:
    """Counts all n-grams of the tokens of a text, which spaces separate, n = 1..4."""
    words = text.split()
    return Counter(tuple(words[i : i + n]) for n in ORDERS for i in range(len(words) - n + 1))


def of_order(ngrams: Ngrams, n: int) -> int:
    return sum(count for ngram, count in ngrams.items() if len(ngram) == n)


class Cider:
    """Scores captions: tf-idf cosine with the references, clipped counts and a length penalty.

    Attributes:
      pictures: number of pictures in the corpus. With a single one all scores are 0.

    Args:
      corpus: of each picture the n-grams of its references. A document is a picture.
    """

    def __init__(self, corpus: Iterable[Sequence[Ngrams]]):
        self._documents: Counter[tuple[str, ...]] = Counter()
        self.pictures = 0
        for texts in corpus:
            self._documents.update(set().union(*texts))
            self.pictures += 1
        self._log_pictures = math.log(max(1, self.pictures))

    def __call__(self, hypothesis: Ngrams, references: Sequence[Ngrams]) -> float:
        """Returns the mean over the references of one picture, in 0..10; there is one reference at least."""
        weights, norms, length = self._weigh(hypothesis)
        total = 0.0
        for other, other_norms, other_length in map(self._weigh, references):
            products = [0.0] * len(ORDERS)
            for ngram, weight in weights.items():
                if ngram in other:
                    products[len(ngram) - 1] += min(weight, other[ngram]) * other[ngram]
            cosines = [p / (a * b) if a and b else 0.0 for p, a, b in zip(products, norms, other_norms, strict=True)]
            total += sum(cosines) / len(ORDERS) * math.exp(-((length - other_length) ** 2) / (2 * SIGMA**2))
        return 10 * total / len(references)

    def _weigh(self, ngrams: Ngrams) -> tuple[dict[tuple[str, ...], float], list[float], int]:
        """Returns the tf-idf of each n-gram, their norm for each n, and the number of bigrams."""
        documents = self._documents
        weights = {g: count * (self._log_pictures - math.log(max(1, documents[g]))) for g, count in ngrams.items()}
        squares = [0.0] * len(ORDERS)
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight**2
        return weights, [math.sqrt(square) for square in squares], of_order(ngrams, 2)
