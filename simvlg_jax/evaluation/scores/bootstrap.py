"""How far a mean over examples could be off, by drawing the examples again."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000


def interval(values: Sequence[float], seed: int) -> tuple[float, float] | None:
    """Returns the 95 % percentile bootstrap interval of the mean of `values`; None for fewer than two values.

    For CIDEr the document frequencies stay those of all examples.
    """
    if len(values) < 2:
        return None
    from scipy import stats  # late: importing it takes a second, and a training without scores does not need it

    found = stats.bootstrap(
        (np.asarray(values, np.float64),), np.mean, n_resamples=RESAMPLES, batch=50, method="percentile", rng=seed
    ).confidence_interval
    return float(found.low), float(found.high)
