"""What the tests of the launch scripts share: a repository, a stand-in for gcloud, and a fake training program."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import standin_gcloud

ROOT = Path(__file__).parent.parent
TYPE = "TYPE=v5litepod-16"
CONFIG = "CONFIG=configs/tiny.py"
WAIT_SECONDS = 120
TPU_REQUIREMENTS = ("requirements-tpu.txt", "requirements.txt")

# In place of simvlg_jax.train: says where it resumes, counts steps into WORKDIR/step_I, saves on SIGTERM and SIGINT.
# ARGS: --steps=N ends it, --fail=I:STATUS makes process I fail at once, --deaf=I lets process I ignore the signals.
FAKE_TRAINING = """
import os, pathlib, signal, sys, time
values = dict(word[2:].split("=") for word in sys.argv if "=" in word)
index = int(os.environ.get("JAX_PROCESS_ID", 0))
received = []
for number in (signal.SIGTERM, signal.SIGINT):
    deaf = values.get("deaf") == str(index)
    signal.signal(number, signal.SIG_IGN if deaf else lambda number, _: received.append(number))
saved = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1]) / f"step_{index}"
saved.parent.mkdir(parents=True, exist_ok=True)
step = int(saved.read_text()) if saved.exists() else 0
how = f"resuming at step {step}" if step else "new run"
print(f"process {index} of {os.environ.get('JAX_NUM_PROCESSES', 1)}, {how}")
print("variables", {k: v for k, v in os.environ.items() if k.startswith("JAX_")}, flush=True)
failing, status = values.get("fail", "-1:0").split(":")
if index == int(failing):
    print("cannot go on", flush=True)
    sys.exit(int(status))
while step < int(values.get("steps", 10**9)) and not received:
    step += 1
    temporary = saved.with_suffix(f".{os.getpid()}")  # process 0 of another slice may write the same file
    temporary.write_text(str(step))
    temporary.rename(saved)
    time.sleep(0.02)
print(f"process {index} ends at step {step}", flush=True)
sys.exit(128 + received[0] if received else 0)
"""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def make_environment(folder: Path, requirements: tuple[str, ...], program: str | None = None) -> None:
    """Makes a .venv that need_environment accepts. Its Python is this one, or always runs `program`."""
    words = [sys.executable]
    if program is not None:
        words.append(str(executable(folder / "program.py", program)))
    executable(folder / "bin" / "python", f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    (folder / "installed").write_text("".join((ROOT / name).read_text() for name in requirements))


def hear_interrupts() -> None:
    """Lets a new process receive SIGINT. A shell cannot trap a signal that is ignored when the shell starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def until(condition):
    """Calls `condition` until it returns a true value, and returns that."""
    end = time.monotonic() + WAIT_SECONDS
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def revision_folder(tmp_path_factory) -> Path:
    """Returns a git repository of one commit with the files of this repository, except large ones."""
    folder = tmp_path_factory.mktemp("repository")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        source = ROOT / name
        if source.is_file() and source.stat().st_size < 500_000:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, folder / name)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "Everything")
    return folder


def git(folder: Path, *arguments: str) -> str:
    settings = ("user.name=tester", "user.email=tester@example.com", "commit.gpgsign=false")
    command = ["git", *(word for setting in settings for word in ("-c", setting)), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


class Cloud:
    """launch/tpu.sh in a repository, with the stand-in as gcloud."""

    def __init__(self, folder: Path, repository: Path):
        self.folder, self.repository = folder / "cloud", repository
        self.folder.mkdir()
        self.settings: dict = {}
        standin = shlex.join([sys.executable, standin_gcloud.__file__, str(self.folder)])
        executable(folder / "bin" / "gcloud", f'#!/bin/sh\nexec {standin} "$@"\n')
        self.environment = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(folder),
            "ZONE": "z",
            "PROJECT": "p",
            "POLL": "0.1",
        }
        self.revision = git(repository, "rev-parse", "--short=10", "HEAD")

    def set(self, **settings) -> None:
        self.settings |= settings
        (self.folder / "settings.json").write_text(json.dumps(self.settings))

    def prepare_homes(self, program: str | None = None) -> None:
        make_environment(self.folder / "home" / "simvlg_jax" / ".venv", TPU_REQUIREMENTS, program)

    def start(self, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", "launch/tpu.sh", *arguments],
            cwd=self.repository,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=hear_interrupts,
        )

    def __call__(self, *arguments: str, status: int = 0) -> str:
        """Returns what the command prints. Its exit status must be `status`."""
        process = self.start(*arguments)
        said = process.communicate(timeout=WAIT_SECONDS)[0]
        assert process.returncode == status, said
        return said

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in read(self.folder / "calls.jsonl").splitlines()]

    @property
    def created(self) -> list[list[str]]:
        return [call for call in self.calls if "create" in call]

    def home(self, worker: int, node: str = "simvlg") -> Path:
        return self.folder / node / f"worker_{worker}" / "simvlg_jax"

    def log(self, worker: int = 0) -> str:
        return read(self.home(worker) / "logs" / "simvlg.log")


@pytest.fixture
def cloud(tmp_path, revision_folder):
    cloud = Cloud(tmp_path, revision_folder)
    yield cloud
    for node in cloud.folder.iterdir():
        standin_gcloud.kill_processes(cloud.folder, node.name)
