"""Several processes as one run: they start together, and when one fails the others stop and say why.

Each process writes what ended it into the run's shared key-value store before it goes; a thread of every other process
looks there. What dies without a word is noticed by its broken connections, or by its missing heartbeat.
"""

import contextlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable

import jax
from jax._src import distributed  # the only way to the run's key-value store

from simvlg_jax.parallel.collectives import DONE_SECONDS
from simvlg_jax.utils.errors import TRY_AGAIN, UserError, run_verb

HEARTBEAT_SECONDS = 60  # a process that is silent for so long is given up
LOOK_SECONDS = 0.5
LOOKS = 3  # in vain, until process 0 is given up
FAREWELL_SECONDS = 5 * LOOK_SECONDS  # process 0 keeps the store until the others have looked
FAILED, DONE = "simvlg_jax/failed", "simvlg_jax/done"
# What the runtime says when a process cannot be reached any more.
LOST = ("Gloo", "gloo", "heartbeat", "UNAVAILABLE:", "DEADLINE_EXCEEDED:", "coordination service")
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def run(work: Callable[[], int], together: bool, preemptible: bool = False) -> int:
    """The exit status of `work`, done by one process; several that work `together` exit with it at once.

    Args:
      preemptible: `work` asks JAX's preemption service whether to stop, which then hears SIGTERM; else SIGTERM kills.
    """
    if not together:
        return work()

    def work_together() -> int:
        start(preemptible)
        try:
            status = work()
            distributed.global_state.client.wait_at_barrier(DONE, 1000 * DONE_SECONDS)
        except UserError:
            raise
        except Exception as error:  # a lost connection is raised as several kinds
            if _ending.wait(2 * LOOK_SECONDS):  # another process has said why: `_watch` ends this one
                threading.Event().wait()
            if not any(word in str(error) for word in LOST):
                raise
            raise UserError(
                "another process of this run is gone, so all stop; start again to resume from the last checkpoint "
                f"({str(error).splitlines()[0][:200]})",
                TRY_AGAIN,
            ) from error
        _finished.set()
        jax.distributed.shutdown()
        return status

    run_verb(work_together, _farewell)


def start(preemptible: bool) -> None:
    """Joins this process to the others of its run.

    The environment says where they are: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID; without them JAX asks the TPU slice, Slurm, Open MPI or Kubernetes.

    Raises:
      UserError: the environment is incomplete, or the others did not come.
    """
    address, count, index = (os.environ.get(name) for name in VARIABLES)
    if address and not (count and index):
        raise UserError(f"{VARIABLES[0]} is set and needs {VARIABLES[1]} and {VARIABLES[2]} beside it", 2)
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", preemptible)
    try:
        jax.distributed.initialize(
            address,
            count and int(count),
            index and int(index),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        raise UserError(
            f"--distributed finds no other processes here (no TPU slice, Slurm, Open MPI): {error} Leave it out on one "
            f"machine, or set {', '.join(VARIABLES)}",
            2,
        ) from error
    except RuntimeError as error:
        raise UserError(
            f"the processes of this run did not find each other: {str(error).splitlines()[0]}", TRY_AGAIN
        ) from error
    threading.Thread(target=_watch, daemon=True).start()


_finished = threading.Event()  # nothing to watch any more
_ending = threading.Event()  # another process has failed


def _farewell(reason: str, status: int) -> None:
    """Tells the other processes why this one fails and ends it, at once: they may hang in the midst of a step."""
    client = distributed.global_state.client
    if client is None or distributed.global_state.num_processes == 1:
        return
    _finished.set()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the store is gone, and with it process 0: they know
        client.key_value_set(f"{FAILED}/{distributed.global_state.process_id}", f"{status} {reason}")
    _leave(status)


def _leave(status: int) -> None:
    """Ends this process at once, and its data workers, which would live on."""
    for worker in multiprocessing.active_children():
        worker.kill()
    if distributed.global_state.process_id == 0:  # the store goes with it
        time.sleep(FAREWELL_SECONDS)
    os._exit(status)


def _watch() -> None:
    """Ends this process when another one has failed."""
    client, in_vain = distributed.global_state.client, 0
    while not _finished.wait(LOOK_SECONDS):
        try:
            failed, in_vain = client.key_value_dir_get(FAILED), 0
        except jax.errors.JaxRuntimeError:
            in_vain += 1
            failed = [(f"{FAILED}/0", f"{TRY_AGAIN} it cannot be reached any more")] if in_vain == LOOKS else []
        if failed and not _finished.is_set():
            _ending.set()
            key, (status, reason) = failed[0][0], failed[0][1].split(" ", 1)
            print(f"error: process {key.rsplit('/', 1)[1]} failed, so all stop: {reason}", file=sys.stderr, flush=True)
            _leave(int(status))
