"""The second of two trainings in one workdir is refused, on one machine or several. A dead one does not count."""

import fcntl
import json
import os
import subprocess
import sys

import pytest

from simvlg_jax.training import run_lock
from simvlg_jax.utils.errors import UserError

HOLD = "import sys, pathlib; from simvlg_jax.training.run_lock import hold\nwith hold(pathlib.Path(sys.argv[1])):\n"


def start(workdir, then):
    """Starts another process that holds the workdir."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"{HOLD}  print('held', flush=True); {then}", str(workdir)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "PATIENCE_SECONDS", 1.0)


def elsewhere(workdir, **fields):
    """Writes what a process of another machine leaves in the workdir."""
    owner = {"host": "elsewhere", "process": 7, "started": 1, "beats": 1, **fields}
    (workdir / run_lock.OWNER).write_text(json.dumps(owner))


def test_second_process_is_refused_with_the_first_ones_name(tmp_path):
    process = start(tmp_path, "input()")
    name = f"process {process.pid} on {os.uname().nodename}"
    with pytest.raises(UserError, match=f"{name} is training in {tmp_path}"), run_lock.hold(tmp_path):
        pass
    process.communicate("\n")
    with run_lock.hold(tmp_path):
        pass


def test_killed_process_does_not_block(tmp_path, quick):
    process = start(tmp_path, "input()")
    process.kill()
    process.wait()
    assert (tmp_path / run_lock.OWNER).exists()
    with run_lock.hold(tmp_path):
        assert json.loads((tmp_path / run_lock.OWNER).read_text())["process"] == os.getpid()
    assert not (tmp_path / run_lock.OWNER).exists()


def test_process_of_another_machine_that_is_alive_is_refused(tmp_path, quick, monkeypatch):
    """If the locks of a disk hold within one machine only, the file that a run renews shows that it is alive."""
    elsewhere(tmp_path)
    reads = iter(range(2, 100))

    def read_and_beat(path, read=run_lock._read):
        owner = read(path)
        elsewhere(tmp_path, beats=next(reads))
        return owner

    monkeypatch.setattr(run_lock, "_read", read_and_beat)
    with pytest.raises(UserError, match="process 7 on elsewhere is training"), run_lock.hold(tmp_path):
        pass


def test_process_of_another_machine_that_is_dead_does_not_block(tmp_path, quick, capsys):
    elsewhere(tmp_path)
    with run_lock.hold(tmp_path) as lock:
        lock.check()
    assert "process 7 on elsewhere has trained in" in capsys.readouterr().err


def test_file_system_without_locks_goes_by_the_beats_alone(tmp_path, quick, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    refused = pytest.raises(UserError, match=rf"process {os.getpid()} on .* is training")
    with run_lock.hold(tmp_path), refused, run_lock.hold(tmp_path):
        pass
    with run_lock.hold(tmp_path):
        pass


def test_run_that_was_taken_over_notices_before_it_saves(tmp_path, quick):
    with run_lock.hold(tmp_path) as lock:
        lock.check()
        elsewhere(tmp_path, beats=9)
        with pytest.raises(UserError, match="process 7 on elsewhere has started to train in"):
            lock.check()
    assert (tmp_path / run_lock.OWNER).exists()  # the other one's
