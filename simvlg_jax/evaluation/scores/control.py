"""The control of every score: the same texts, each scored against another picture's references."""

import numpy as np


def derangement(n: int, seed: int) -> np.ndarray:
    """Returns (n,) int64: a random permutation of 0..n-1 without fixed points (Sattolo's algorithm)."""
    if n < 2:
        raise ValueError(f"a permutation without fixed points needs at least 2 items: got {n}")
    order = np.arange(n)
    generator = np.random.default_rng(seed)
    for i in range(n - 1, 0, -1):
        j = generator.integers(i)
        order[i], order[j] = order[j], order[i]
    return order
