"""Data worker processes: Ctrl-C on a terminal reaches them too, and they must not outlive the process that trains."""

import os
import signal
import subprocess
import sys
import tempfile
import time

import psutil
import pytest

from simvlg_jax.training.checkpoint import Checkpoints

CACHE = tempfile.mkdtemp(prefix="simvlg_jax_compiled_")


def start(workdir, *flags):
    """A run with two data workers, in a process group of its own, as a terminal starts it."""
    command = [sys.executable, "-m", "simvlg_jax.train", "--config", "configs/tiny.py", "--workdir", str(workdir)]
    settings = {"data.workers": 2, "train.steps": 100_000, "train.eval_every": 0, "train.save_every": 100_000}
    environment = {"JAX_COMPILATION_CACHE_DIR": CACHE, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
        [*command, "--config.mesh.data=1", *(f"--config.{key}={value}" for key, value in settings.items()), *flags],
        stderr=subprocess.PIPE, text=True, env=os.environ | environment, start_new_session=True,
    )  # fmt: skip


def wait_for(process, beginning):
    """Reads what the process says until a line begins so; returns the lines."""
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith(beginning):
            return said
    raise AssertionError("".join(said))


def shared_memory():
    return set(os.listdir("/dev/shm"))


@pytest.mark.parametrize(
    ("number", "moment"), [(signal.SIGINT, "step 5/"), (signal.SIGTERM, "step 5/"), (signal.SIGINT, "44,096")]
)
def test_signal_to_all_processes_of_a_terminal_saves(tmp_path, number, moment):
    """While steps are taken, and while the workers start: then a signal would end them before they can ignore it."""
    process = start(tmp_path)
    said = wait_for(process, moment)
    if moment == "44,096":
        while len(psutil.Process(process.pid).children()) < 2:  # one of them is multiprocessing's tracker
            time.sleep(0.002)
    os.killpg(process.pid, number)
    said += process.communicate(timeout=120)[1].splitlines(keepends=True)
    assert process.returncode == 128 + number, "".join(said)
    assert "Traceback" not in "".join(said), "".join(said)
    assert f"stopped by {number.name} at step" in said[-1]
    if moment != "44,096":
        assert Checkpoints(tmp_path, read_only=True).latest() >= 5


def test_killed_run_leaves_no_process_and_no_shared_memory(tmp_path):
    before = shared_memory()
    process = start(tmp_path)
    wait_for(process, "step 5/")
    workers = psutil.Process(process.pid).children(recursive=True)
    blocks = shared_memory() - before
    assert len(workers) >= 2 and blocks
    process.kill()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    deadline = time.monotonic() + 20
    while blocks & shared_memory():
        assert time.monotonic() < deadline
        time.sleep(0.1)
