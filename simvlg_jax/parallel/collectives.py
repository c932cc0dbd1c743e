"""What the processes of a run exchange: barriers, and arrays and numbers of all of them on the host."""

import itertools

import jax
import numpy as np
from jax._src import distributed  # the only way to the run's barriers
from jax.experimental import multihost_utils

DONE_SECONDS = 24 * 3600  # the others may wait this long for a process that still writes
_barriers = itertools.count()  # a barrier's name serves once


def sync(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def wait_for_all(name: str) -> None:
    """Waits until every process is here, for a day if need be; `sync`, being a collective, gives up sooner."""
    if jax.process_count() > 1:
        distributed.global_state.client.wait_at_barrier(f"simvlg_jax/{name}/{next(_barriers)}", 1000 * DONE_SECONDS)


def gather(array: jax.Array) -> np.ndarray:
    """A global array as numpy on every process."""
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def gather_each(array: np.ndarray) -> np.ndarray:
    """(P, ...): each process's array (...), of equal shape and at most 32 bits."""
    return array[None] if jax.process_count() == 1 else multihost_utils.process_allgather(array[None], tiled=True)


def numbers_of_all(*numbers: float) -> np.ndarray:
    """(P, n) float32: each process's n numbers."""
    return gather_each(np.array(numbers, np.float32))
