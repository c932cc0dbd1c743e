"""launch/worker.sh: the bucket, starting, restarting and stopping on the workers of a slice."""

import contextlib
import os
import re
import shutil
import signal
import subprocess

import pytest
from launching import CONFIG, ROOT, TPU_REQUIREMENTS, TYPE, executable, make_environment, until

# In place of systemd: worker 1 has none.
SUDO = """#!/bin/sh
case $HOME in *worker_1) echo "sudo: a password is required" >&2; exit 1 ;; esac
printf '%s\\n' "$*" >>"$HOME/units"
shift # -n
exec "$@"
"""
SYSTEMD_RUN = """#!/bin/sh
while [ "$1" != gcsfuse ]; do shift; done
"$@" >/dev/null 2>&1 &
"""
GCSFUSE = """#!/bin/sh
echo "$@" >>"$HOME/mounts"
if [ -e "$HOME/../denied" ]; then echo "no access" >&2; exit 1; fi
sleep 0.3
echo mine >"$HOME/mounted"
"""


# In place of Python: exits with the next one of the statuses, or when told to.
PYTHON = """#!/bin/bash
echo "called: $*"
read -r status <"$HOME/statuses"
sed -i 1d "$HOME/statuses"
if [ "$status" = wait ]; then trap "echo saved; exit 143" TERM; while :; do sleep 0.05; done; fi
exit "$status"
"""


def test_bucket_is_mounted_once_on_every_worker(cloud, tmp_path):
    cloud.prepare_homes()
    cloud.set(runs=2)
    programs = {
        "sudo": SUDO,
        "systemd-run": SYSTEMD_RUN,
        "systemctl": '#!/bin/sh\n! test -e "$HOME/../denied"\n',
        "gcsfuse": GCSFUSE,
        "findmnt": '#!/bin/sh\ncat "$HOME/mounted" 2>/dev/null\n',
    }
    for name, program in programs.items():
        executable(tmp_path / "bin" / name, program)
    cloud("create", TYPE)
    said = cloud("setup", "BUCKET=gs://mine")
    assert said.count("simvlg-w-0: ready") == said.count("simvlg-w-1: ready") == 2
    assert said.count("gcsfuse is no systemd unit here") == 1
    for worker in range(2):
        home = cloud.home(worker)
        assert (home.parent / "mounted").exists()
        mounts = (home.parent / "mounts").read_text().splitlines()
        assert len(mounts) == 1 and ("--foreground" in mounts[0]) == (worker == 0)
        assert mounts[0].endswith(f" mine {home.parent / 'bucket'}") and "--implicit-dirs" in mounts[0]
        assert (home / "current" / "shared").resolve() == home.parent / "bucket"
        assert (home / "current").resolve() == home / cloud.revision
        assert not list(home.parent.glob("*.tar.gz"))
    first = cloud.home(0).parent
    unit = (first / "units").read_text().splitlines()[-1].split()
    assert {f"--uid={os.getuid()}", "--property=Before=systemd-user-sessions.service"} < set(unit)
    assert "holds another bucket, mine" in cloud("setup", "BUCKET=gs://other", status=1)
    # What the unit cannot mount is tried once more here, so that its reason is seen.
    (first / "mounted").unlink()
    (first.parent / "denied").touch()
    said = cloud("setup", "BUCKET=gs://mine", status=1)
    assert "no access\nerror: simvlg-w-0: cannot mount gs://mine; may the workers' service account write" in said


@pytest.fixture
def worker(tmp_path):
    """Returns launch/worker.sh on one worker, where Python exits with the given statuses in turn."""
    folder = tmp_path / "home" / "simvlg_jax" / "revision"
    shutil.copytree(ROOT / "launch", folder / "launch")
    for name in TPU_REQUIREMENTS:
        shutil.copy(ROOT / name, folder / name)
    make_environment(folder / ".venv", TPU_REQUIREMENTS)
    home = tmp_path / "home"
    executable(folder / ".venv" / "bin" / "python", PYTHON)

    def call(verb: str, *arguments: str, statuses: str = "", status: int = 0) -> str:
        if statuses:
            (home / "statuses").write_text("\n".join(statuses.split()) + "\n")
        result = subprocess.run(
            ["bash", "launch/worker.sh", verb, *arguments],
            cwd=folder,
            env={"PATH": os.environ["PATH"], "HOME": str(home), "HOSTNAME": "w-0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        assert result.returncode == status, result.stdout
        return result.stdout

    call.home = home
    yield call
    for path in home.glob("simvlg_jax/state/*.loop"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(path.read_text()), signal.SIGKILL)


@pytest.mark.parametrize(
    ("statuses", "result", "starts"),
    [
        ("0", "done", 1),
        ("70 143 134 0", "done", 4),
        ("75 2", "wrong", 2),
        ("137 1", "failed", 2),
        ("70 75 70 75 0", "failed", 4),
    ],
)
def test_restarts(worker, statuses, result, starts):
    worker("start", CONFIG, "WORKDIR=runs/a", "ARGS=--x=* --y='1'", "PAUSE=0.1", "MAX_RESTARTS=3", statuses=statuses)
    assert until(lambda: worker("result").strip() not in ("running", "none"))
    assert worker("result").strip() == result
    log = (worker.home / "simvlg_jax" / "logs" / "simvlg.log").read_text()
    calls = [line.split() for line in log.splitlines() if line.startswith("called: ")]
    assert len(calls) == starts
    assert {"--distributed", "configs/tiny.py", "shared/runs/a", "--x=*", "--y='1'"} < set(calls[0])
    assert re.findall("exit status ([0-9]+) after", log) == statuses.split()[:starts]
    assert (f"restart {starts - 1} of 3" in log) == (starts > 1)
    assert f"w-0: {result} | " in worker("status")
    assert f"w-0: {result}" in worker("log", status=0 if result == "done" else 1)
    worker("log", "FOLLOW=no")


def test_stop_saves_and_ends_the_restarts(worker):
    assert "w-0: not running | no log yet" in worker("status")
    assert "no run is going on" in worker("stop")
    worker("start", CONFIG, "WORKDIR=a", statuses="wait")
    log = worker.home / "simvlg_jax" / "logs" / "simvlg.log"
    until(lambda: "called" in log.read_text())
    assert worker("result") == "running\n"
    assert "a run is going on here" in worker("idle", status=1)
    assert "w-0: goes on" in worker("start", CONFIG, "WORKDIR=a")
    assert "w-0: stopped" in worker("stop")
    assert "saved\n" in log.read_text() and "exit status 143" in log.read_text()
    assert worker("result") == "stopped\n"
    worker("idle")
    # What does not hear the signal is killed in the end.
    python = worker.home / "simvlg_jax" / "revision" / ".venv" / "bin" / "python"
    executable(python, "#!/bin/bash\ntrap '' TERM\necho deaf\nwhile :; do sleep 0.05; done\n")
    worker("start", CONFIG, "WORKDIR=a")
    until(lambda: "deaf" in log.read_text())
    assert "was killed" in worker("stop", "WAIT=1")
    until(lambda: worker("result") == "stopped\n")


def test_stop_between_restarts(worker):
    worker("start", CONFIG, "WORKDIR=a", "PAUSE=2", statuses="75 wait")
    until(lambda: "starting again" in (worker.home / "simvlg_jax" / "logs" / "simvlg.log").read_text())
    worker("stop")
    assert worker("result") == "stopped\n"


def test_half_an_installation_does_not_start_nor_does_one_that_goes_on(worker):
    folder = worker.home / "simvlg_jax"
    (folder / "revision" / ".venv" / "installed").write_text("jax\n")
    (folder / "state").mkdir()
    setup = subprocess.Popen(["flock", folder / "state" / "setup.lock", "sleep", "0.3"])
    until((folder / "state" / "setup.lock").exists)
    assert "w-0: not installed, or not wholly; first: bash launch/tpu.sh setup" in worker("start", status=1)
    assert setup.poll() == 0


def test_machine_going_down_saves(worker):
    worker("start", CONFIG, "WORKDIR=a", statuses="wait")
    log = worker.home / "simvlg_jax" / "logs" / "simvlg.log"
    until(lambda: "called" in log.read_text())
    os.kill(int((worker.home / "simvlg_jax" / "state" / "simvlg.loop").read_text()), signal.SIGTERM)
    assert until(lambda: worker("result") == "terminated\n")
    assert "saved" in log.read_text()
