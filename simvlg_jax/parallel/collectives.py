"""Barriers, and gathering arrays and numbers of all processes on the host."""

import itertools

import jax
import numpy as np
from jax._src import distributed  # the only way to the run's barriers
from jax.experimental import multihost_utils

DONE_SECONDS = 24 * 3600  # the others may wait this long for a process that still writes
_barriers = itertools.count()  # the name of a barrier can be used only once


def sync(name: str) -> None:
    """Waits until every process has called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def wait_for_all(name: str) -> None:
    """Waits until every process has called it, for up to a day. `sync` is a collective and times out earlier."""
    if jax.process_count() > 1:
        distributed.global_state.client.wait_at_barrier(f"simvlg_jax/{name}/{next(_barriers)}", 1000 * DONE_SECONDS)


def gather(array: jax.Array) -> np.ndarray:
    """Returns a global array as numpy on every process."""
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def gather_each(array: np.ndarray) -> np.ndarray:
    """Returns (P, ...): the array (...) of each process. Shapes must be equal, and dtypes at most 32 bits wide."""
    return array[None] if jax.process_count() == 1 else multihost_utils.process_allgather(array[None], tiled=True)


def numbers_of_all(*numbers: float) -> np.ndarray:
    """Returns (P, n) float32: the n numbers of each process."""
    return gather_each(np.array(numbers, np.float32))


def text_of_first(text: str) -> str:
    """Returns the text of process 0 on every process."""
    if jax.process_count() == 1:
        return text
    content = np.frombuffer(text.encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.array(len(content), np.int32)))
    mine = content if jax.process_index() == 0 else np.zeros(length, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(mine).astype(np.uint8)).decode()
