"""Prepares shards in processes of this machine."""

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from ctypes import c_int64
from typing import Any

from simvlg_jax.data import workers as worker_processes
from simvlg_jax.data.preparing.shard import Job, prepare_shard
from simvlg_jax.data.readers import Shard
from simvlg_jax.utils.bar import Progress
from simvlg_jax.utils.errors import UserError, warn

TRIES = 3  # of a shard whose worker dies
POLL_SECONDS = 0.25

_done: Any = None  # in a worker: weight and number of records of each shard, in shared memory


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(job: Job, shards: dict[int, Shard], workers: int, progress: Progress) -> None:
    """Prepares the shards with their numbers in `workers` processes, or in this one if that is enough.

    Raises UserError if the workers on a shard are killed TRIES times, and what `prepare_shard` raises.
    """
    workers = min(workers, len(shards))
    if workers > 1:
        _Pool(job, shards, workers, progress).run()
        return
    weight = count = 0
    for number, shard in shards.items():
        base = weight, count
        report = prepare_shard(
            job, number, shard, lambda done, seen, base=base: progress.update(base[0] + done, base[1] + seen)
        )
        weight, count = weight + shard.weight, count + report.written + sum(report.skipped.values())


class _Pool:
    def __init__(self, job: Job, shards: dict[int, Shard], workers: int, progress: Progress):
        self._job, self._shards, self._workers, self._progress = job, shards, workers, progress
        self._context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        self._done = self._context.RawArray(c_int64, 2 * job.count)  # without a lock, which a dead worker would keep
        self._deaths: Counter[int] = Counter()

    def run(self) -> None:
        waiting = list(reversed(self._shards))
        before = set(multiprocessing.active_children())
        worker_processes.start_tracker()
        try:
            while waiting:
                self._run_pool(waiting)
        finally:
            for process in set(multiprocessing.active_children()) - before:
                process.kill()

    def _run_pool(self, waiting: list[int]) -> None:
        """Prepares shards until none waits, or until a worker dies, which breaks the pool."""
        running: dict[Future, int] = {}
        pool = ProcessPoolExecutor(self._workers, self._context, _start, (self._done,))
        try:
            while waiting or running:
                while waiting and len(running) < self._workers:
                    number = waiting.pop()
                    with worker_processes.signals_blocked():  # the first calls start the processes
                        running[pool.submit(_work, self._job, number, self._shards[number])] = number
                for future in wait(running, POLL_SECONDS, FIRST_COMPLETED).done:
                    future.result()
                    del running[future]
                self._progress.update(sum(self._done[::2]), sum(self._done[1::2]))
        except BrokenProcessPool:
            unfinished = [number for future, number in running.items() if not future.done() or future.exception()]
            self._count_deaths(unfinished)
            waiting += reversed(unfinished)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _count_deaths(self, numbers: list[int]) -> None:
        self._deaths.update(numbers)
        often = [number for number in numbers if self._deaths[number] >= TRIES]
        if often:
            names = ", ".join(str(number) for number in often)
            raise UserError(
                f"a worker process was killed {TRIES} times during shard {names}, perhaps for want of memory: "
                "run again with fewer --workers, it goes on from here"
            )
        warn(f"a worker process was killed; its shard is prepared again (shards {sorted(numbers)})")


def _start(done: Any) -> None:
    global _done
    worker_processes.start_worker(0, 0)
    _done = done


def _work(job: Job, number: int, shard: Shard) -> None:
    advance: Callable[[int, int], None] = _advance(number)
    prepare_shard(job, number, shard, advance)


def _advance(number: int) -> Callable[[int, int], None]:
    def advance(weight: int, count: int) -> None:
        _done[2 * number], _done[2 * number + 1] = weight, count

    return advance
