"""Data worker processes: they receive Ctrl-C on a terminal too, and must not outlive the training process."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from simvlg_jax.training.checkpoint import Checkpoints
from simvlg_jax.utils.errors import UNEXPECTED

CACHE = tempfile.mkdtemp(prefix="simvlg_jax_compiled_")


def start(workdir, *flags):
    """Starts a run with two data workers in its own process group, as a terminal does."""
    command = [sys.executable, "-m", "simvlg_jax.train", "--config", "configs/tiny.py", "--workdir", str(workdir)]
    settings = {"data.workers": 2, "train.steps": 100_000, "evals.val.every": 0, "train.save_every": 100_000}
    environment = {"JAX_COMPILATION_CACHE_DIR": CACHE, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
        [*command, "--config.mesh.data=1", *(f"--config.{key}={value}" for key, value in settings.items()), *flags],
        stderr=subprocess.PIPE, text=True, env=os.environ | environment, start_new_session=True,
    )  # fmt: skip


def wait_for(process, words):
    """Reads stderr up to a line with the words; returns the lines."""
    said = []
    for line in process.stderr:
        said.append(line)
        if words in line:
            return said
    raise AssertionError("".join(said))


def blocked_or_ignored(pid):
    """Whether the process blocks or ignores both SIGINT and SIGTERM."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    mask = int(fields["SigBlk"], 16) | int(fields["SigIgn"], 16)
    return all(mask >> (number - 1) & 1 for number in (signal.SIGINT, signal.SIGTERM))


def workers_of(process):
    return [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]


def shared_memory():
    return set(os.listdir("/dev/shm"))


@pytest.fixture
def run(tmp_path):
    process = start(tmp_path / "run")
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_all_processes_of_a_terminal_saves(run, tmp_path, number):
    said = wait_for(run, "step 5/")
    os.killpg(run.pid, number)
    said += run.communicate(timeout=120)[1].splitlines(keepends=True)
    assert run.returncode == 128 + number, "".join(said)
    assert "Traceback" not in "".join(said), "".join(said)
    assert f"stopped by {number.name} at step" in said[-1]
    assert Checkpoints(tmp_path / "run", read_only=True).latest() >= 5


def test_signal_while_workers_start_is_survived_too(run, tmp_path):
    """A worker takes seconds until it runs our code, and must survive signals before that."""
    said = wait_for(run, "trained and")
    while len(workers_of(run)) < 2:
        time.sleep(0.001)
    assert all(blocked_or_ignored(worker.pid) for worker in workers_of(run))
    os.killpg(run.pid, signal.SIGINT)
    said += run.communicate(timeout=120)[1].splitlines(keepends=True)
    assert run.returncode == 128 + signal.SIGINT and "Traceback" not in "".join(said), "".join(said)


@pytest.mark.parametrize("early", [True, False])
def test_killed_worker_ends_the_run_with_the_reason(run, early):
    """While the workers start, or in the midst of training."""
    said = wait_for(run, "trained and" if early else "step 5/")
    while len(workers_of(run)) < 2:
        time.sleep(0.001)
    workers = workers_of(run)
    workers[-1].kill()
    said += run.communicate(timeout=120)[1].splitlines(keepends=True)
    assert run.returncode == UNEXPECTED, "".join(said)
    assert "error: a data worker was killed (exit code -9)" in "".join(said) and "Traceback" not in "".join(said)
    assert not psutil.wait_procs(workers, timeout=20)[1]


def test_killed_run_leaves_no_process_and_no_shared_memory(run):
    before = shared_memory()
    wait_for(run, "step 5/")
    workers = psutil.Process(run.pid).children(recursive=True)
    blocks = shared_memory() - before
    assert len(workers) >= 2 and blocks
    run.kill()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    deadline = time.monotonic() + 120  # some may be of a test that runs beside this one
    while blocks & shared_memory():
        assert time.monotonic() < deadline
        time.sleep(0.1)
