"""Times compiled functions, and the ratio of two speeds that were measured in turns."""

import os
import time
from collections.abc import Callable, Sequence
from statistics import median

import jax


def cores() -> int:
    """Returns how many CPU cores this process may use, as XLA counts them; `taskset` lowers it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Returns the median time until the arrays that `run` returns are computed, after one call that does not count."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return median(times)


def compiled_seconds(traced: jax.stages.Traced, arguments: Sequence, repeats: int) -> float:
    """Returns `median_seconds` of a traced function, which is compiled first."""
    program = traced.lower().compile()
    return median_seconds(lambda: program(*arguments), repeats)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Returns (median, least, greatest) ratio of two speeds within a round."""
    each = [one / other for one, other in zip(ours, theirs, strict=True)]
    return median(each), min(each), max(each)


def compared(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Returns the medians of two speeds in images/s, and their ratios, in words."""
    middle, least, greatest = ratios(ours, theirs)
    return (
        f"ours {median(ours):6.1f} images/s, PyTorch {median(theirs):6.1f}: ratio {middle:.2f} "
        f"({least:.2f} to {greatest:.2f})"
    )
