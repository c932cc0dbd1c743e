"""The launch scripts: their words and flags, and whole runs on a stand-in for gcloud (tests/standin_gcloud.py)."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import quick_compile
import standin_gcloud

ROOT = Path(__file__).parent.parent
PLACE = "--zone=z --project=p --quiet"
TYPE = "TYPE=v5litepod-16"
CONFIG = "CONFIG=configs/tiny.py"
WAIT_SECONDS = 120
TPU_REQUIREMENTS = ("requirements-tpu.txt", "requirements.txt")

# In place of simvlg_jax.train: says where it resumes, counts steps into WORKDIR/step, saves on SIGTERM and SIGINT.
# ARGS: --steps=N ends it, --fail=I:STATUS makes process I fail at once, --deaf=I lets process I ignore the signals.
FAKE_TRAINING = """
import argparse, os, pathlib, signal, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("-m")
parser.add_argument("--distributed", action="store_true")
parser.add_argument("--config")
parser.add_argument("--workdir", type=pathlib.Path)
parser.add_argument("--steps", type=int, default=10**9)
parser.add_argument("--fail", default="-1:0")
parser.add_argument("--deaf", type=int, default=-1)
options = parser.parse_args()
index = int(os.environ.get("JAX_PROCESS_ID", 0))
received = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN if index == options.deaf else lambda number, _: received.append(number))
options.workdir.mkdir(parents=True, exist_ok=True)
saved = options.workdir / f"step_{index}"
step = int(saved.read_text()) if saved.exists() else 0
how = f"resuming at step {step}" if step else "new run"
print(f"process {index} of {os.environ.get('JAX_NUM_PROCESSES', 1)}, {how}")
print("variables", {k: v for k, v in os.environ.items() if k.startswith("JAX_")}, flush=True)
failing, status = options.fail.split(":")
if index == int(failing):
    print("cannot go on", flush=True)
    sys.exit(int(status))
while step < options.steps and not received:
    step += 1
    temporary = saved.with_suffix(".new")
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
    """A .venv that need_environment finds complete; its Python is this one, or always runs `program`."""
    program_words = ""
    if program is not None:
        (folder / "program.py").parent.mkdir(parents=True, exist_ok=True)
        (folder / "program.py").write_text(program)
        program_words = f"{shlex.quote(str(folder / 'program.py'))} "
    executable(folder / "bin" / "python", f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {program_words}"$@"\n')
    wanted = "".join((ROOT / name).read_text() for name in requirements).rstrip("\n")
    (folder / "installed").write_text(f"{wanted}\n")


def hear_interrupts() -> None:
    """For a new process: shells cannot trap what is ignored when they start, as in a job put into the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def until(condition, seconds: float = WAIT_SECONDS):
    """The first true value of `condition`, asked again and again."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def revision_folder(tmp_path_factory) -> Path:
    """A git repository of one commit, with the files of this one but the large ones."""
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
    names = ["-c", "user.name=tester", "-c", "user.email=tester@example.com", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *names, *arguments], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


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
        """What it prints; its exit status must be `status`."""
        process = self.start(*arguments)
        said = process.communicate(timeout=WAIT_SECONDS)[0]
        assert process.returncode == status, said
        return said

    @property
    def calls(self) -> list[str]:
        return [shlex.join(json.loads(line)) for line in read(self.folder / "calls.jsonl").splitlines()]

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


# ---- what is asked for ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "bash launch/tpu.sh create|setup|run|logs|status|stop|delete"),
        ("train", "unknown verb 'train'; it is one of create, setup, run, logs, status, stop, delete"),
        (f"create {TYPE} NAMES=a", "unknown key 'NAMES'; known are: NAME ZONE PROJECT TYPE"),
        ("create 'NAME ZONE=a'", "unknown key 'NAME ZONE'"),
        ("create v5litepod-16", "'v5litepod-16' is no KEY=VALUE"),
        ("create ZONE=", "TYPE is missing"),
        (f"create {TYPE} ZONE=", "ZONE is missing"),
        (f"create {TYPE} PROJECT=", "PROJECT is missing"),
        ("create TYPE=big", "TYPE is like v5litepod-16, v6e-16, v5p-16 or v4-32, not 'big'"),
        ("create TYPE=v5e-16", "TYPE=v5litepod-16"),
        ("create TYPE=v5e:4x4", "TYPE is an accelerator type, not a topology: for v5e:4x4 say TYPE=v5litepod-16"),
        ("create TYPE=v9x-16", "VERSION is missing"),
        (f"create {TYPE} KIND=cheap", "KIND is on-demand, reserved or spot, not 'cheap'"),
        (f"create {TYPE} QUEUED=maybe", "QUEUED is yes or no, not 'maybe'"),
        (f"create {TYPE} SLICES=two", "SLICES is a number, not 'two'"),
        (f"create {TYPE} SLICES=0", "SLICES is at least 1"),
        (f"create {TYPE} SLICES=2 QUEUED=no", "several slices are only made together in a queue"),
        (f"create {TYPE} NAME='a b'", "NAME is lower-case letters"),
        (f"create {TYPE} NAME=../a", "NAME is lower-case letters"),
        ("setup BUCKET=bucket", "BUCKET is gs://NAME, not 'bucket'"),
        ("setup BUCKET=gs://bucket/folder", "folders in it belong to WORKDIR"),
        ("setup BUCKET=gs://bucket SHARED=/a", "BUCKET and SHARED exclude each other"),
        ("setup SHARED=here", "SHARED is a folder's absolute path"),
        ("run", "CONFIG is missing"),
        (f"run {CONFIG} WORKDIR=/runs", "WORKDIR lies in the shared folder"),
        (f"run {CONFIG} WORKDIR=../runs", "WORKDIR lies in the shared folder"),
        (f"run {CONFIG} MAX_RESTARTS=-1", "MAX_RESTARTS is a number, not '-1'"),
        (f"run {CONFIG} PAUSE=soon", "PAUSE is a number of seconds, not 'soon'"),
        (f"run {CONFIG} POLL=.5.", "POLL is a number of seconds, not '.5.'"),
        (f"run {CONFIG} WATCH=yes {TYPE}", "WATCH=yes needs BUCKET=gs://... (or SHARED)"),
        (f"run {CONFIG} WATCH=yes SHARED=/a", "TYPE is missing"),
    ],
)
def test_wrong_arguments_give_one_message_and_status_2(cloud, arguments, message):
    said = cloud(*shlex.split(arguments), status=2)
    assert message in said
    assert said.count("error:") == (1 if arguments else 0)
    assert not [call for call in cloud.calls if not call.startswith("config")]


def test_topologies_are_called_as_in_the_table(cloud):
    rows = [line.split(" | ") for line in (ROOT / "launch" / "README.md").read_text().splitlines() if "| llm=" in line]
    slices = {(row[1], row[2]) for row in rows}
    assert ("v4:2x2x4", "v4-32") in slices and ("v5e:16x16", "v5litepod-256") in slices
    for topology, name in slices:
        assert f"for {topology} say TYPE={name}\n" in cloud("create", f"TYPE={topology}", status=2)


def test_a_wrong_value_says_that_it_came_from_the_environment(cloud):
    cloud.environment["NAME"] = "DESKTOP-1"
    said = cloud("status", status=2)
    assert "not 'DESKTOP-1' (from the environment)\n" in said
    assert "not 'DESKTOP-2'\n" in cloud("status", "NAME=DESKTOP-2", status=2)


def test_zone_and_project_come_from_gcloud(cloud):
    here = ["ZONE=", "PROJECT="]
    assert "--zone=ZONE --project=PROJECT" in cloud("create", TYPE, *here, "--dry-run")
    cloud.set(**{"compute/zone": "zone-a", "project": "mine"})
    assert "--zone=zone-a --project=mine" in cloud("create", TYPE, *here, "--dry-run")
    cloud("create", TYPE, *here)
    assert "--zone=zone-a --project=mine" in cloud.calls[-1]


def test_gcloud_missing(cloud, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "sed"):
        (tools / name).symlink_to(shutil.which(name))
    cloud.environment["PATH"] = str(tools)
    assert "no gcloud on the PATH; it is at https://cloud.google.com/sdk/docs/install" in cloud("status", status=1)
    assert "--zone=ZONE --project=p" in cloud("status", "ZONE=", "--dry-run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("setup REVISION=nowhere", "git knows no revision 'nowhere'"),
        ("run CONFIG=configs/none.py:big", "has no configs/none.py; is it committed?"),
    ],
)
def test_revision_must_have_what_is_run(cloud, arguments, message):
    assert message in cloud(*arguments.split(), status=1)


def test_only_commits_reach_workers(cloud, tmp_path):
    launch = cloud.repository / "launch"
    cloud.repository = tmp_path / "other"
    shutil.copytree(launch, cloud.repository / "launch")
    assert "is not a git repository" in cloud("setup", status=1)
    (cloud.repository / "launch" / "worker.sh").rename(tmp_path / "worker.sh")
    git(cloud.repository, "init", "--quiet")
    git(cloud.repository, "add", "--all")
    git(cloud.repository, "commit", "--quiet", "--message", "No worker.sh")
    assert "has no launch/worker.sh" in cloud("setup", status=1)
    (tmp_path / "worker.sh").rename(cloud.repository / "launch" / "worker.sh")
    git(cloud.repository, "add", "--all")
    assert "there are uncommitted changes, which workers would not get" in cloud("setup", status=1)
    git(cloud.repository, "commit", "--quiet", "--message", "All")
    with open(cloud.repository / "launch" / "local.sh", "a") as script:
        script.write("# changed\n")
    assert "there are uncommitted changes" in cloud("run", CONFIG, status=1)
    said = cloud("setup", "REVISION=HEAD", "--dry-run")
    assert (
        f"note: uncommitted changes are not part of revision {git(cloud.repository, 'rev-parse', 'HEAD')[:10]}" in said
    )


# ---- what gcloud is asked to do ----


@pytest.mark.parametrize(
    ("keys", "command"),
    [
        ("", "queued-resources create simvlg --spot --node-id=simvlg --accelerator-type=v5litepod-16"
             " --runtime-version=v2-alpha-tpuv5-lite"),
        ("KIND=on-demand TYPE=v5p-16 'CREATE_FLAGS=--network=n  --internal-ips'",
         "queued-resources create simvlg --node-id=simvlg --accelerator-type=v5p-16"
         " --runtime-version=v2-alpha-tpuv5 --network=n --internal-ips"),
        ("AUTOCHECKPOINT=yes", "queued-resources create simvlg --spot --autocheckpoint-enabled --node-id=simvlg"
                               " --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite"),
        ("KIND=reserved SLICES=2 NAME=a TYPE=v6e-16", "queued-resources create a --reserved --node-count=2"
         " --node-prefix=a --accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e"),
        ("QUEUED=no", "tpu-vm create simvlg --spot --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite"),
        ("QUEUED=no KIND=on-demand TYPE=v4-32", "tpu-vm create simvlg --accelerator-type=v4-32"
                                                " --version=tpu-ubuntu2204-base"),
        ("QUEUED=no KIND=reserved VERSION=other AUTOCHECKPOINT=yes", "tpu-vm create simvlg --reserved"
         " --autocheckpoint-enabled --accelerator-type=v5litepod-16 --version=other"),
    ],
)  # fmt: skip
def test_create_flags(cloud, keys, command):
    keys = shlex.split(keys)
    cloud("create", TYPE, *keys)
    track = "alpha " * ("AUTOCHECKPOINT=yes" in keys)
    assert f"{track}compute tpus {command} {PLACE}" in cloud.calls
    before = len(cloud.calls)
    assert "exists already" in cloud("create", TYPE, *keys)
    assert not [call for call in cloud.calls[before:] if " create " in call]


SSH = "gcloud compute tpus tpu-vm ssh simvlg"
SET_UP = 'test -e simvlg_jax/%s || { echo "error: not set up; first: bash launch/tpu.sh setup" >&2; exit 1; }; '
WORKER = SET_UP + "bash simvlg_jax/%s/launch/worker.sh"
CURRENT = WORKER % ("current", "current")
QUEUED_STATE = f"gcloud compute tpus queued-resources describe simvlg '--format=value(state.state)' {PLACE}"
CREATE = (
    "gcloud compute tpus queued-resources create simvlg --spot --node-id=simvlg --accelerator-type=v5litepod-16 "
    f"--runtime-version=v2-alpha-tpuv5-lite {PLACE}"
)
DELETE = f"gcloud compute tpus queued-resources delete simvlg --force {PLACE}"
SETUP = [
    "mkdir -p build",
    "git archive --format=tar.gz --output=build/simvlg_jax-REV.tar.gz REV",
    "gcloud compute tpus tpu-vm scp build/simvlg_jax-REV.tar.gz simvlg:simvlg_jax-REV.tar.gz --worker=all " + PLACE,
    "rm -f build/simvlg_jax-REV.tar.gz",
    f"{SSH} --worker=all '--command=mkdir -p simvlg_jax/REV && if test -e simvlg_jax-REV.tar.gz; "
    "then tar -xzf simvlg_jax-REV.tar.gz -C simvlg_jax/REV; fi && "
    "bash simvlg_jax/REV/launch/worker.sh setup BUCKET=gs://mine SHARED= NAME=simvlg && "
    f"rm -f simvlg_jax-REV.tar.gz' {PLACE}",
]
IDLE = f"{SSH} --worker=all '--command={WORKER % ('REV', 'REV')} idle NAME=simvlg' {PLACE}"
START = (
    f"{SSH} --worker=all '--command={WORKER % ('REV', 'REV')} start BUCKET=gs://mine SHARED= CONFIG=configs/tiny.py "
    "WORKDIR=runs/simvlg '\\''ARGS=--a=1 --b=it'\\''\\'\\'''\\''s'\\'' MAX_RESTARTS=20 PAUSE=10 NAME=simvlg' " + PLACE
)


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["create", TYPE], [QUEUED_STATE, CREATE, QUEUED_STATE]),
        (["setup"], SETUP),
        (["run", CONFIG, "ARGS=--a=1 --b=it's"], [
            IDLE, START, f"{SSH} --worker=0 '--command={CURRENT} log FOLLOW=yes NAME=simvlg' {PLACE}",
        ]),
        (["run", CONFIG, "ARGS=--a=1 --b=it's", "WATCH=yes", TYPE], [
            IDLE, START, QUEUED_STATE,
            f"{SSH} --worker=all '--command=if ! test -e simvlg_jax/current; then echo none; exit; fi; "
            f"bash simvlg_jax/current/launch/worker.sh result NAME=simvlg' {PLACE}",
            DELETE, CREATE, *SETUP, START,
        ]),
        (["logs", "FOLLOW=no"], [
            f"{SSH} --worker=0 '--command={CURRENT} log FOLLOW=no NAME=simvlg' {PLACE}",
        ]),
        (["status"], [
            QUEUED_STATE, f"{SSH} --worker=all '--command={CURRENT} status NAME=simvlg' {PLACE}",
        ]),
        (["stop", "SSH_FLAGS=--internal-ip --plain"], [
            f"{SSH} --worker=all '--command={CURRENT} stop NAME=simvlg' --internal-ip --plain {PLACE}",
        ]),
        (["stop", "SLICES=2"], [
            f"{SSH}-{i} --worker=all '--command={CURRENT} stop NAME=simvlg' {PLACE}"
            for i in range(2)
        ]),
        (["delete"], [DELETE]),
        (["delete", "QUEUED=no"], [f"gcloud compute tpus tpu-vm delete simvlg {PLACE}"]),
    ],
    ids=lambda value: "-".join(value)[:24] if isinstance(value, list) and "=" not in value[0][:9] else "",
)  # fmt: skip
def test_dry_run(cloud, arguments, lines):
    """The commands, one per line, as a shell reads them; none is run."""
    said = cloud(*arguments, "BUCKET=gs://mine", "--dry-run")
    assert said.splitlines() == [line.replace("REV", cloud.revision) for line in lines]
    assert not cloud.calls
    assert not (cloud.repository / "build").exists()


# ---- what gcloud and the slice may answer ----


@pytest.mark.parametrize(
    ("answer", "advice"),
    [
        ("RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptible' has been exceeded. Limit: 0 in zone z.",
         "no quota for v5litepod-16, KIND=spot, in z: try another ZONE or KIND, or ask for more at "
         "https://console.cloud.google.com/iam-admin/quotas?project=p"),
        ('{"code": 8, "message": "There is no more capacity in the zone \\"z\\""}', "QUEUED=yes waits for it"),
        ("PERMISSION_DENIED: Permission 'tpu.nodes.create' denied",
         "you need the role roles/tpu.admin, and the project the API: gcloud services enable tpu.googleapis.com"),
        ("NOT_FOUND: Resource 'runtimeVersions/x' was not found", "compute tpus accelerator-types list --zone=z"),
        ("You do not currently have an active account selected. Please run: $ gcloud auth login", "not logged in"),
    ],
)  # fmt: skip
def test_known_errors_come_with_advice(cloud, answer, advice):
    cloud.set(fail={"create": answer})
    said = cloud("create", TYPE, status=1)
    assert answer in said
    assert advice in next(line for line in said.splitlines() if line.startswith("error:"))
    assert said.count("\nerror:") == 1


def test_what_is_not_there(cloud):
    assert "there is no simvlg in z of p" in cloud("status", status=1)
    for arguments in (["stop"], ["setup"], ["delete"], ["run", CONFIG, "SHARED=/tmp"]):
        assert "error: there is no simvlg in z of p: are NAME, ZONE and QUEUED right?" in cloud(*arguments, status=1)
    cloud.set(fail={"describe": "PERMISSION_DENIED: Permission 'tpu.nodes.get' denied"})
    assert "roles/tpu.admin" in cloud("status", status=1)


def test_create_tells_each_state_and_why_it_failed(cloud):
    said = cloud("create", TYPE)
    states = [line.split(": ")[1] for line in said.splitlines()]
    assert states == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    assert "simvlg is deleted; gs://mine is kept" in cloud("delete", "BUCKET=gs://mine")
    cloud.set(states=["WAITING_FOR_RESOURCES", "FAILED"], reason="Quota limit reached in zone z")
    said = cloud("create", TYPE, status=1)
    assert "Quota limit reached in zone z\nerror: no quota for v5litepod-16" in said
    assert "simvlg is FAILED: the request could not be met. Delete it and ask again" in said
    cloud("delete")
    cloud.set(states=["SUSPENDED"], reason="")
    assert "simvlg is SUSPENDED: it was preempted or stopped" in cloud("create", TYPE, status=1)
    assert "simvlg is deleted; what lay on its own disk is gone" in cloud("delete")


def test_several_workers_need_a_shared_folder(cloud):
    cloud.set(workers=1)
    cloud("create", TYPE, "NAME=one")
    cloud.set(workers=2)
    cloud("create", TYPE, "NAME=two")
    message = "two has several workers, which need one folder to save to: BUCKET=gs://..., or SHARED="
    assert message in cloud("run", CONFIG, "NAME=two", status=2)
    said = cloud("run", CONFIG, "NAME=one", status=1)
    assert "note: checkpoints lie on the slice's own disk and go with it" in said
    assert "error: not set up; first: bash launch/tpu.sh setup" in said


# ---- on the workers ----


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
    said = cloud("setup", "BUCKET=gs://mine").splitlines()
    assert sorted(line for line in said if "ready" in line) == 2 * ["simvlg-w-0: ready"] + 2 * ["simvlg-w-1: ready"]
    assert len([line for line in said if "gcsfuse is no systemd unit here" in line]) == 1
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
    stop, run = (first / "units").read_text().splitlines()
    assert stop == "-n systemctl stop simvlg-bucket"
    unit = f"--unit=simvlg-bucket --uid={os.getuid()} --gid={os.getgid()} --property=After=network-online.target"
    assert f"{unit} --property=Before=systemd-user-sessions.service gcsfuse --foreground --implicit-dirs" in run
    assert "holds another bucket, mine" in cloud("setup", "BUCKET=gs://other", status=1)
    # What the unit cannot mount is tried once more here, so that its reason is seen.
    (first / "mounted").unlink()
    (first.parent / "denied").touch()
    said = cloud("setup", "BUCKET=gs://mine", status=1)
    assert "no access\nerror: simvlg-w-0: cannot mount gs://mine; may the workers' service account write" in said


@pytest.fixture
def worker(tmp_path):
    """launch/worker.sh on one worker, where Python exits with the statuses given, one after another."""
    folder = tmp_path / "home" / "simvlg_jax" / "revision"
    shutil.copytree(ROOT / "launch", folder / "launch")
    for name in TPU_REQUIREMENTS:
        shutil.copy(ROOT / name, folder / name)
    make_environment(folder / ".venv", TPU_REQUIREMENTS)
    home = tmp_path / "home"
    python = executable(
        folder / ".venv" / "bin" / "python",
        '#!/bin/bash\necho "called: $*"\nread -r status <"$HOME/statuses"\nsed -i 1d "$HOME/statuses"\n'
        'if [ "$status" = wait ]; then trap "echo saved; exit 143" TERM; while :; do sleep 0.05; done; fi\n'
        'exit "$status"\n',
    )
    assert python.stat().st_mode & stat.S_IXUSR

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
    called = (
        "called: -m simvlg_jax.train --distributed --config configs/tiny.py --workdir shared/runs/a --x=* --y='1'\n"
    )
    assert log.count(called) == starts
    for status in statuses.split()[:starts]:
        assert f"exit status {status} after" in log
    assert (f"restart {starts - 1} of 3" in log) == (starts > 1)
    assert f"w-0: {result} | " in worker("status") and f"the run ends: {result}" in worker("status")
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


# ---- whole runs ----


def test_killed_run_resumes_on_two_workers(cloud, tmp_path):
    """The real training program: both workers are killed amid a run, the same command goes on and finishes."""
    cached = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    cloud.set(environment={"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick_compile.FLAGS, **cached})
    cloud.prepare_homes()
    shared = tmp_path / "shared"
    checkpoints = shared / "runs" / "simvlg" / "checkpoints"
    saved = checkpoints / "5" / "commit_success.txt"
    overrides = "ARGS=--config.train.steps=30 --config.train.save_every=5 --config.train.eval_every=30"
    run = ["run", f"{CONFIG}:vit", f"SHARED={shared}", overrides]
    cloud("create", TYPE)
    cloud("setup", f"SHARED={shared}")
    cloud(*run, "FOLLOW=no")
    assert "a run is going on here; end it with: bash launch/tpu.sh stop" in cloud(*run, status=1)
    assert "simvlg-w-1: running" in cloud("status")
    until(lambda: saved.exists() or "the run ends" in cloud.log())
    standin_gcloud.kill_processes(cloud.folder, "simvlg")
    said = cloud("status")
    assert "simvlg: ACTIVE" in said and "simvlg-w-0: not running" in said and "simvlg-w-1: not running" in said
    assert "resuming at step" not in cloud.log() and "the run ends" not in cloud.log()

    said = cloud(*run)
    assert "worker 0's log; Ctrl-C leaves the run going" in said
    assert "resuming at step" in said and "simvlg-w-0: done" in said
    until(lambda: "the run ends: done" in cloud.log(1))
    assert (checkpoints / "30").exists()
    assert "simvlg-w-0: no run is going on" in cloud("stop")
    assert "simvlg is deleted" in cloud("delete")
    assert not (cloud.folder / "simvlg").exists()


def test_watch_makes_a_preempted_slice_again(cloud, tmp_path):
    cloud.prepare_homes(FAKE_TRAINING)
    shared = tmp_path / "shared"
    keys = [TYPE, f"SHARED={shared}"]
    cloud("create", *keys)
    cloud("setup", *keys)
    watch = cloud.start("run", CONFIG, *keys, "WATCH=yes", "ARGS=--steps=120")
    until(lambda: int(read(shared / "runs" / "simvlg" / "step_1") or 0) > 5)
    standin_gcloud.preempt(cloud.folder, "simvlg")
    said = watch.communicate(timeout=WAIT_SECONDS)[0]
    assert watch.returncode == 0, said
    words = [line.split("simvlg: ")[1] for line in said.splitlines() if "simvlg: " in line]
    states = ["SUSPENDED", "ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING"]
    expected = [f"{state}, the run: unknown" for state in states]
    expected += [f"ACTIVE, the run: {result}" for result in ("none", "running", "done")]
    assert words[-len(expected) :] == expected
    assert "resuming at step" in cloud.log(1)


def test_watch_gives_up_when_nothing_helps(cloud, tmp_path):
    cloud.prepare_homes(FAKE_TRAINING)
    keys = [TYPE, f"SHARED={tmp_path / 'shared'}"]
    cloud("create", *keys)
    cloud("setup", *keys)
    cloud.set(states=["FAILED"], reason="Quota limit reached in zone z")
    watch = cloud.start("run", CONFIG, *keys, "WATCH=yes", "POLL=0")
    assert any("watching" in line for line in watch.stdout)
    standin_gcloud.preempt(cloud.folder, "simvlg", noticed=False)
    said = watch.communicate(timeout=WAIT_SECONDS)[0]
    assert watch.returncode == 1
    assert "simvlg: PREEMPTED, the run: preempted\n" in said
    assert "error: no quota for v5litepod-16" in said
    assert "gave up after 10 failures in a row" in said


def test_watch_starts_what_was_rebooted_and_makes_nothing_but_spot_slices_again(cloud, tmp_path):
    cloud.prepare_homes(FAKE_TRAINING)
    keys = ["QUEUED=no", "KIND=on-demand", f"SHARED={tmp_path / 'shared'}"]
    cloud("create", TYPE, *keys)
    cloud("setup", *keys)
    watch = cloud.start("run", CONFIG, *keys, "WATCH=yes")
    said = []

    def read_until(words: str) -> None:
        while words not in (line := watch.stdout.readline()):
            assert line, said
            said.append(line)

    read_until("READY, the run: running")
    cloud.set(fail={"ssh": "Connection refused"})
    read_until("READY, the run: unknown")
    read_until("Connection refused")
    until(lambda: cloud.calls[-6:].count(cloud.calls[-1]) == 3)  # it looked more than once
    cloud.set(fail={})
    read_until("READY, the run: running")
    assert not [line for line in said if "Connection refused" in line]
    standin_gcloud.kill_processes(cloud.folder, "simvlg", "1")
    read_until("READY, the run: none")
    read_until("simvlg-w-0: goes on")
    read_until("READY, the run: running")
    assert "resuming at step" in cloud.log(1)
    standin_gcloud.preempt(cloud.folder, "simvlg")
    rest = watch.communicate(timeout=WAIT_SECONDS)[0]
    assert watch.returncode == 1
    assert rest.splitlines()[-1].startswith("error: simvlg is PREEMPTED: it was preempted or stopped")


def test_watch_ends_when_the_run_is_stopped_or_the_slice_deleted(cloud, tmp_path):
    cloud.prepare_homes(FAKE_TRAINING)
    keys = [TYPE, f"SHARED={tmp_path / 'shared'}"]
    cloud("create", *keys)
    cloud("setup", *keys)
    for verb, message in (("stop", "the run ended: stopped"), ("delete", "simvlg is not there any more")):
        watch = cloud.start("run", CONFIG, *keys, "WATCH=yes")
        assert any("watching" in line for line in watch.stdout)
        cloud(verb)
        said = watch.communicate(timeout=WAIT_SECONDS)[0]
        assert watch.returncode == 1
        assert message in said
    assert len([call for call in cloud.calls if " create " in call]) == 1


def test_several_slices_start_together(cloud, tmp_path):
    cloud.set(workers=1)
    cloud.prepare_homes(FAKE_TRAINING)
    keys = ["SLICES=2", f"SHARED={tmp_path / 'shared'}", "SSH_FLAGS=--tunnel-through-iap"]
    cloud("create", TYPE, *keys)
    cloud("setup", *keys)
    assert [call for call in cloud.calls if call.startswith("alpha compute tpus tpu-vm scp ")]
    cloud("run", CONFIG, *keys, "ARGS=--steps=3", "FOLLOW=no")
    for node in ("simvlg-0", "simvlg-1"):
        log = cloud.home(0, node) / "logs" / "simvlg.log"
        assert until(lambda log=log: "the run ends: done" in read(log))
    assert "simvlg-0-w-0: done" in cloud("status", *keys)


def test_ctrl_c_leaves_the_run_going(cloud, tmp_path):
    cloud.prepare_homes(FAKE_TRAINING)
    keys = [TYPE, f"SHARED={tmp_path / 'shared'}"]
    cloud("create", *keys)
    cloud("setup", *keys)
    process = cloud.start("run", CONFIG, *keys)
    said = []
    for line in process.stdout:
        said.append(line)
        if "new run" in line:
            os.killpg(process.pid, signal.SIGINT)
            break
    said += process.communicate(timeout=WAIT_SECONDS)[0].splitlines()
    assert process.returncode == 130, said
    assert any("the run goes on" in line for line in said)
    assert "simvlg-w-0: running" in cloud("status")
    cloud("stop")
    assert "simvlg-w-1: stopped" in cloud("status")


# ---- GPUs ----


@pytest.fixture
def node(tmp_path):
    """launch/gpu.sh in a folder where training is faked; returns a Popen."""
    folder = tmp_path / "node"
    shutil.copytree(ROOT / "launch", folder / "launch")
    for name in ("requirements.txt", "requirements-gpu.txt"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "configs").mkdir()
    (folder / "configs" / "tiny.py").touch()
    make_environment(folder / ".venv", ("requirements.txt",), FAKE_TRAINING)
    (tmp_path / "bin").mkdir()

    def start(*arguments: str, **variables: str) -> subprocess.Popen:
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", "launch/gpu.sh", *arguments],
            cwd=folder,
            env={"PATH": path, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=hear_interrupts,
        )

    def call(*arguments: str, status: int = 0, **variables: str) -> str:
        process = start(*arguments, **variables)
        said = process.communicate(timeout=WAIT_SECONDS)[0]
        assert process.returncode == status, said
        return said

    call.start, call.folder, call.bin = start, folder, tmp_path / "bin"
    return call


RUN = (CONFIG, "WORKDIR=run")
CPU = (*RUN, "DEVICE=cpu")
COMMAND = ".venv/bin/python -m simvlg_jax.train"
ARGUMENTS = "--config configs/tiny.py --workdir run"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ((), 2, "bash launch/gpu.sh CONFIG="),
        (("WORKDIR=run",), 2, "CONFIG is missing"),
        ((CONFIG,), 2, "WORKDIR is missing"),
        (("CONFIG=configs/none.py:a", "WORKDIR=run"), 2, "no config file configs/none.py"),
        ((*CPU, "PROCESSES=0"), 2, "PROCESSES is at least 1"),
        ((*CPU, "PROCESSES=all"), 2, "PROCESSES is a number, not 'all'"),
        ((*RUN, "DEVICE=tpu"), 2, "DEVICE is gpu or cpu, not 'tpu'"),
        ((*CPU, "STEPS=3"), 2, "unknown key 'STEPS'"),
        (RUN, 1, "nvidia-smi shows no GPU here; DEVICE=cpu tries it without"),
    ],
)
def test_gpu_wrong_arguments(node, arguments, status, message):
    executable(node.bin / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    said = node(*arguments, status=status)
    assert message in said
    assert said.count("error:") == (1 if arguments else 0)


def test_gpu_dry_run_shares_the_gpus(node):
    executable(node.bin / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    said = node(*RUN, "PROCESSES=2", "--dry-run")
    assert "note: nvidia-smi shows no GPU here; assuming 2, one for each process\n" in said
    assert "JAX_LOCAL_DEVICE_IDS=1 " in said
    executable(node.bin / "nvidia-smi", '#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: H200"; done\n')
    prepare = ["need_environment requirements.txt requirements-gpu.txt", "export JAX_PLATFORMS=cuda,cpu"]
    assert node(*RUN, "--dry-run").splitlines() == [*prepare, f"{COMMAND} {ARGUMENTS}"]
    processes = [
        f"env JAX_COORDINATOR_ADDRESS=127.0.0.1:20000 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID={i} "
        f"JAX_LOCAL_DEVICE_IDS={share} {COMMAND} --distributed {ARGUMENTS} --config.seed=1"
        for i, share in enumerate(("0,1", "2,3"))
    ]
    several = [*RUN, "PROCESSES=2", "PORT=20000", "ARGS=--config.seed=1", "--dry-run"]
    assert node(*several).splitlines() == [*prepare, "mkdir -p run", *processes]
    assert "4 GPUs cannot be shared evenly by PROCESSES=3" in node(*RUN, "PROCESSES=3", status=2)
    assert "JAX_LOCAL_DEVICE_IDS=1 " in node(*several, CUDA_VISIBLE_DEVICES="5,7")
    slurm = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "12"}
    srun = f"srun --kill-on-bad-exit=1 --cpus-per-task=12 {COMMAND} --distributed {ARGUMENTS}"
    assert node(*RUN, "--dry-run", **slurm).splitlines() == [*prepare, srun]
    assert "its tasks are the processes" in node(*several, status=2, **slurm)
    assert "sbatch --ntasks-per-node=4" in node(*RUN, status=1, **(slurm | {"SLURM_NTASKS_PER_NODE": "2"}))
    assert not (node.folder / "run").exists()


def test_gpu_one_process(node):
    said = node(*CPU, "ARGS=--steps=2")
    assert "process 0 of 1, new run\nvariables {'JAX_PLATFORMS': 'cpu'}" in said
    assert "resuming at step 2" in node(*CPU, "ARGS=--steps=3")
    node(*CPU, "ARGS=--fail=0:3", status=3)


def test_gpu_slurm_starts_with_srun(node):
    executable(node.bin / "srun", '#!/bin/sh\necho "srun $*"\nshift\nexec "$@"\n')
    said = node(*CPU, "ARGS=--steps=2", SLURM_JOB_ID="1", SLURM_NTASKS="2")
    assert f"srun --kill-on-bad-exit=1 {COMMAND} --distributed {ARGUMENTS} --steps=2" in said
    assert "srun" not in node(*CPU, "ARGS=--steps=2", SLURM_JOB_ID="1", SLURM_NTASKS="1")


def test_gpu_several_processes(node):
    said = node(*CPU, "PROCESSES=2", "PORT=20000", "ARGS=--steps=2")
    assert "process 0 of 2, new run" in said and "process 1" not in said
    other = (node.folder / "run" / "process_1.log").read_text()
    assert "process 1 of 2, new run" in other
    assert "'JAX_COORDINATOR_ADDRESS': '127.0.0.1:20000'" in other and "LOCAL_DEVICE" not in other


def test_gpu_failing_process_ends_the_others(node):
    said = node(*CPU, "PROCESSES=3", "ARGS=--fail=1:7", status=7)
    assert "process 1 failed with exit status 7\nthe end of run/process_1.log:\n" in said
    assert "cannot go on" in said
    assert "process 0 ends at step" in said
    assert "process 2 ends at step" in (node.folder / "run" / "process_2.log").read_text()
    node(*CPU, "PROCESSES=2", "GRACE=0", "ARGS=--fail=1:7 --deaf=0", status=7)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_gpu_signals_are_passed_on(node, number):
    process = node.start(*CPU, "PROCESSES=2")
    steps = [node.folder / "run" / f"step_{i}" for i in range(2)]
    until(lambda: all(step.exists() for step in steps))
    process.send_signal(number)
    said = process.communicate(timeout=WAIT_SECONDS)[0]
    assert process.returncode == 128 + number, said
    assert "passed on to all processes" in said and "process 0 ends at step" in said and "failed" not in said
    assert "process 1 ends at step" in (node.folder / "run" / "process_1.log").read_text()


# ---- all of them ----


def test_shellcheck():
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=path)
    if not shellcheck:
        pytest.skip("shellcheck is not installed (requirements-test.txt has it)")
    scripts = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "launch").glob("*.sh"))
    result = subprocess.run([shellcheck, "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
