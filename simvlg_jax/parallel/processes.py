"""Runs several processes as one: they start together, and if one fails, all stop and print its reason.

A process that fails writes its reason into the run's shared key-value store before it exits. A thread of every other
process polls the store. A process that dies without reporting a reason is detected by its closed connection or a missed
heartbeat.
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

HEARTBEAT_SECONDS = 60  # without a heartbeat for this long, a process counts as lost
POLL_SECONDS = 0.5
MAX_FAILED_POLLS = 3  # after this many in a row, process 0 counts as lost
STORE_GRACE_SECONDS = 5 * POLL_SECONDS  # process 0 keeps the store this long, so that the others read the reason
FAILED, DONE = "simvlg_jax/failed", "simvlg_jax/done"
# Words in the runtime's errors when it loses the connection to a process.
LOST = ("Gloo", "gloo", "heartbeat", "UNAVAILABLE:", "DEADLINE_EXCEEDED:", "coordination service")
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def run(work: Callable[[], int], together: bool, preemptible: bool = False) -> int:
    """Runs `work` and returns its exit status. If several processes work `together`, exits with the status instead.

    Args:
      preemptible: JAX's preemption service handles SIGTERM, and `work` asks it whether to stop. If False, SIGTERM kills
        the process.
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
            if _ending.wait(2 * POLL_SECONDS):  # another process has reported a reason, so `_watch` ends this one
                threading.Event().wait()
            if not any(word in str(error) for word in LOST):
                raise
            raise UserError(
                "another process of this run is lost, so all stop; start again to resume from the last checkpoint "
                f"({str(error).splitlines()[0][:200]})",
                TRY_AGAIN,
            ) from error
        _finished.set()
        jax.distributed.shutdown()
        return status

    run_verb(work_together, _report_failure)


def start(preemptible: bool) -> None:
    """Connects this process to the other processes of its run.

    The environment variables JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID
    define the run. Without them JAX asks the TPU slice, Slurm, Open MPI or Kubernetes.

    Raises:
      UserError: the environment is incomplete, or the other processes did not connect in time.
    """
    address, count, index = (os.environ.get(name) for name in VARIABLES)
    if address and not (count and index):
        raise UserError(f"{VARIABLES[0]} is set, so {VARIABLES[1]} and {VARIABLES[2]} must be set too", 2)
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
            f"--distributed finds no other processes here (no TPU slice, Slurm, Open MPI): {error} Omit it on a single "
            f"machine, or set {', '.join(VARIABLES)}",
            2,
        ) from error
    except RuntimeError as error:
        raise UserError(
            f"the processes of this run did not connect to each other: {str(error).splitlines()[0]}", TRY_AGAIN
        ) from error
    threading.Thread(target=_watch, daemon=True).start()


_finished = threading.Event()  # `_watch` must stop
_ending = threading.Event()  # another process has failed


def _report_failure(reason: str, status: int) -> None:
    """Reports the reason to the other processes and exits at once, since they may be blocked within a step."""
    client = distributed.global_state.client
    if client is None or distributed.global_state.num_processes == 1:
        return
    _finished.set()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 and its store are lost, which ends all processes
        client.key_value_set(f"{FAILED}/{distributed.global_state.process_id}", f"{status} {reason}")
    _exit(status)


def _exit(status: int) -> None:
    """Ends this process at once. Kills its data workers too, which would otherwise continue to run."""
    for worker in multiprocessing.active_children():
        worker.kill()
    if distributed.global_state.process_id == 0:  # process 0 holds the store
        time.sleep(STORE_GRACE_SECONDS)
    os._exit(status)


def _watch() -> None:
    """Ends this process when another process has failed."""
    client, failed_polls = distributed.global_state.client, 0
    while not _finished.wait(POLL_SECONDS):
        try:
            failed, failed_polls = client.key_value_dir_get(FAILED), 0
        except jax.errors.JaxRuntimeError:
            failed_polls += 1
            lost = failed_polls == MAX_FAILED_POLLS
            failed = [(f"{FAILED}/0", f"{TRY_AGAIN} the connection to it is lost")] if lost else []
        if failed and not _finished.is_set():
            _ending.set()
            key, (status, reason) = failed[0][0], failed[0][1].split(" ", 1)
            print(f"error: process {key.rsplit('/', 1)[1]} failed, so all stop: {reason}", file=sys.stderr, flush=True)
            _exit(int(status))
