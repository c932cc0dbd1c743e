"""How many batches are ready when the step asks for one, with a slow step and with slow reading. Nothing is timed."""

import os
import threading
import time

import pytest
from test_data_pipeline import Numbered, config, take, train

from simvlg_jax.data import pipeline, receiving
from simvlg_jax.data.timings import Timings

BATCH, LIMIT = 8, 60  # examples; seconds after which a test that hangs fails


def wait(semaphore: threading.Semaphore) -> None:
    assert semaphore.acquire(timeout=LIMIT), "no batch was made"


def depth(timings: Timings) -> float:
    taken = timings.take()
    return taken.ready / taken.draws


@pytest.mark.parametrize("threads", [1, 2])
def test_rises_to_the_size_of_the_buffer_if_the_step_is_slow(threads, monkeypatch):
    made, collate, timings = threading.Semaphore(0), pipeline.collate, Timings()

    def counted(*args, **options):
        batch = collate(*args, **options)
        made.release()
        return batch

    monkeypatch.setattr(pipeline, "collate", counted)
    iterator = train(config(read_threads=threads), Numbered(40), timings=timings)
    buffer = 2 * threads
    next(iterator)  # starts reading, so that nothing is ready
    for _ in range(buffer):
        wait(made)
    depths = []
    for _ in range(3):
        for _ in range(10):
            wait(made)  # the buffer is full again before the step asks for the next one
            next(iterator)
        depths.append(depth(timings))
    # The batches that wait at the end of a line of the log are counted in the next line.
    assert depths[1:] == [buffer, buffer]


def test_is_zero_if_reading_is_slow(monkeypatch):
    asked, collate, timings = threading.Semaphore(0), pipeline.collate, Timings()

    def after_it_is_asked_for(*args, **options):
        wait(asked)
        return collate(*args, **options)

    class Clock:
        @staticmethod
        def monotonic():
            now = time.monotonic()
            asked.release()
            return now

    monkeypatch.setattr(pipeline, "collate", after_it_is_asked_for)
    monkeypatch.setattr(receiving, "time", Clock)
    take(train(config(read_threads=1), Numbered(40), timings=timings), 10)
    assert depth(timings) == 0


class Marking(Numbered):
    """Leaves a file for each record that is read, in a folder of the process that reads it."""

    def __init__(self, count, folder):
        super().__init__(count)
        self.folder = folder

    def __getitem__(self, index):
        own = self.folder / str(os.getpid())
        own.mkdir(exist_ok=True)
        (own / f"{time.monotonic_ns()}-{index}").touch()
        return super().__getitem__(index)


def test_counts_what_worker_processes_have_made(tmp_path):
    timings = Timings()
    iterator = train(config(workers=2, read_threads=1), Marking(800, tmp_path), timings=timings)
    for drawn in range(1, 16):
        next(iterator)
        # Each worker reads in one thread, so it has made all batches but the one that it reads last: two of each
        # worker's are ready, or one if the step has just taken the other.
        deadline = time.monotonic() + LIMIT
        while [len(list(one.iterdir())) >= BATCH * (drawn // 2 + 3) for one in tmp_path.iterdir()] != [True, True]:
            assert time.monotonic() < deadline, "the workers do not read ahead"
            time.sleep(0.01)
        if drawn == 5:
            timings.take()
    iterator.close()
    assert depth(timings) >= 2
