"""launch/tpu.sh: its commands and flags, its calls of gcloud, and how it uses the answers."""

import ast
import shlex
import shutil
import sys

import pytest
from launching import CONFIG, ROOT, TYPE, executable, git


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "bash launch/tpu.sh create|setup|run|logs|status|stop|delete"),
        ("train", "unknown verb 'train'; it is one of create, setup, run, logs, status, stop, delete"),
        (f"create {TYPE} NAMES=a", "unknown key 'NAMES'; known are: NAME ZONE PROJECT TYPE"),
        ("create v5litepod-16", "'v5litepod-16' is no KEY=VALUE"),
        ("create", "TYPE is missing"),
        (f"create {TYPE} ZONE=", "ZONE is missing"),
        ("create TYPE=big", "TYPE cannot be 'big'"),
        ("create TYPE=v5e-16", "TYPE=v5litepod-16"),
        ("create TYPE=v9x-16", "VERSION is missing"),
        (f"create {TYPE} KIND=cheap", "KIND cannot be 'cheap': on-demand, reserved or spot"),
        (f"create {TYPE} SLICES=0", "SLICES cannot be '0'"),
        (f"create {TYPE} SLICES=2 QUEUED=no", "several slices are only made together in a queue"),
        (f"create {TYPE} NAME=../a", "NAME cannot be '../a'"),
        ("setup BUCKET=gs://bucket/folder", "BUCKET cannot be 'gs://bucket/folder'"),
        ("setup BUCKET=gs://bucket SHARED=/a", "BUCKET and SHARED exclude each other"),
        ("setup SHARED=here", "SHARED cannot be 'here'"),
        ("run", "CONFIG is missing"),
        (f"run {CONFIG} WORKDIR=/runs", "WORKDIR cannot be '/runs'"),
        (f"run {CONFIG} WORKDIR=a/../../runs", "WORKDIR cannot be 'a/../../runs'"),
        (f"run {CONFIG} POLL=.5.", "POLL cannot be '.5.'"),
        (f"run {CONFIG} WATCH=yes {TYPE}", "WATCH=yes needs BUCKET=gs://... (or SHARED)"),
        (f"run {CONFIG} WATCH=yes SHARED=/a", "TYPE is missing"),
    ],
)
def test_wrong_arguments_give_one_message_and_status_2(cloud, arguments, message):
    said = cloud(*shlex.split(arguments), status=2)
    assert message in said
    assert said.count("error:") == (1 if arguments else 0)
    assert not [call for call in cloud.calls if call[0] != "config"]


def test_topologies_are_called_as_in_the_table(cloud):
    rows = [line.split(" | ") for line in (ROOT / "launch" / "README.md").read_text().splitlines() if "| llm=" in line]
    slices = {(row[1], row[2]) for row in rows}
    assert ("v4:2x2x4", "v4-32") in slices and ("v5e:16x16", "v5litepod-256") in slices
    for topology, name in slices:
        assert f"TYPE={name}\n" in cloud("create", f"TYPE={topology}", status=2)


def test_a_wrong_value_says_that_it_came_from_the_environment(cloud):
    cloud.environment["NAME"] = "DESKTOP-1"
    assert "'DESKTOP-1' (from the environment)" in cloud("status", status=2)
    assert "from the environment" not in cloud("status", "NAME=DESKTOP-2", status=2)


def test_zone_and_project_come_from_gcloud(cloud):
    cloud.set(**{"compute/zone": "zone-a", "project": "mine"})
    cloud("create", TYPE, "ZONE=", "PROJECT=")
    assert {"--zone=zone-a", "--project=mine"} < set(cloud.calls[-1])


def test_missing_programs(cloud, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    cloud.environment["PATH"] = str(tools)
    for name in ("bash", "dirname"):
        (tools / name).symlink_to(shutil.which(name))
    assert "error: Python 3.8 or newer is needed" in cloud("status", status=1)
    executable(tools / "python3", f'#!{shutil.which("bash")}\nexec {sys.executable} "$@"\n')
    assert "no gcloud on the PATH; it is at https://cloud.google.com/sdk/docs/install" in cloud("status", status=1)
    assert "--zone=ZONE --project=p" in cloud("status", "ZONE=", "--dry-run")


def test_python_3_8_reads_the_program():
    for name in ("keys", "gcloud", "slices", "watch", "tpu"):
        ast.parse((ROOT / "launch" / f"{name}.py").read_text(), feature_version=(3, 8))


def test_revision_must_have_what_is_run(cloud):
    assert "git knows no revision 'nowhere'" in cloud("setup", "REVISION=nowhere", status=1)
    assert "has no configs/none.py; is it committed?" in cloud("run", "CONFIG=configs/none.py:big", status=1)


def test_only_commits_reach_workers(cloud, tmp_path):
    launch = cloud.repository / "launch"
    cloud.repository = tmp_path / "other"
    shutil.copytree(launch, cloud.repository / "launch")
    assert "is not a git repository" in cloud("setup", status=1)
    git(cloud.repository, "init", "--quiet")
    (cloud.repository / "file").touch()
    git(cloud.repository, "add", "file")
    git(cloud.repository, "commit", "--quiet", "--message", "No worker.sh")
    assert "has no launch/worker.sh" in cloud("setup", status=1)
    git(cloud.repository, "add", "--all")
    for verb in (["setup"], ["run", CONFIG]):
        assert "there are uncommitted changes, which workers would not get" in cloud(*verb, status=1)
    git(cloud.repository, "commit", "--quiet", "--message", "All")
    (cloud.repository / "file").write_text("changed")
    assert "note: uncommitted changes are not part of" in cloud("setup", "REVISION=HEAD", "--dry-run")


@pytest.mark.parametrize(
    ("keys", "flags"),
    [
        ("", "--spot --node-id=simvlg --runtime-version=v2-alpha-tpuv5-lite"),
        ("KIND=on-demand TYPE=v5p-16 'CREATE_FLAGS=--network=n  --internal-ips'",
         "--network=n --internal-ips --runtime-version=v2-alpha-tpuv5"),
        ("KIND=reserved SLICES=2 TYPE=v6e-16",
         "--reserved --node-count=2 --node-prefix=simvlg --runtime-version=v2-alpha-tpuv6e"),
        ("QUEUED=no KIND=on-demand TYPE=v4-32", "--version=tpu-ubuntu2204-base"),
        ("QUEUED=no VERSION=other AUTOCHECKPOINT=yes", "--spot --version=other --autocheckpoint-enabled"),
    ],
)  # fmt: skip
def test_create_flags(cloud, keys, flags):
    keys = [TYPE, *shlex.split(keys)]
    cloud("create", *keys)
    (call,) = cloud.created
    assert set(flags.split()) <= set(call)
    assert (call[0] == "alpha") == ("AUTOCHECKPOINT=yes" in keys)
    assert ("queued-resources" in call) == ("QUEUED=no" not in keys)
    assert len({"--spot", "--reserved"} & set(call)) == ("KIND=on-demand" not in keys)
    assert "exists already" in cloud("create", *keys)
    assert len(cloud.created) == 1


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        (["create", TYPE], "describe create describe"),
        (["setup"], "mkdir git scp rm ssh"),
        (["run", CONFIG, "ARGS=--a=1 --b=it's"], "idle start log"),
        (["run", CONFIG, "WATCH=yes", TYPE],
         "idle start describe result delete create mkdir git scp rm ssh start"),
        (["logs", "FOLLOW=no"], "log"),
        (["status"], "describe status"),
        (["stop", "SLICES=2"], "stop stop"),
        (["delete"], "delete"),
    ],
)  # fmt: skip
def test_dry_run_prints_commands_and_runs_none(cloud, arguments, steps):
    said = cloud(*arguments, "BUCKET=gs://mine", "--dry-run")
    commands = [shlex.split(line) for line in said.splitlines()]
    assert len(commands) == len(steps.split()), said
    for command, step in zip(commands, steps.split(), strict=True):
        assert step in command or f"worker.sh {step} " in command[-4]
        assert command[0] != "gcloud" or {"--zone=z", "--project=p", "--quiet"} <= set(command)
    assert not cloud.calls
    assert not (cloud.repository / "build").exists()


def test_arguments_reach_the_worker_as_they_are(cloud):
    start = cloud("run", CONFIG, "SHARED=/a", "ARGS=--a=* --b=it's $HOME", "--dry-run").splitlines()[1]
    command = next(word for word in shlex.split(start) if word.startswith("--command="))
    assert "ARGS=--a=* --b=it's $HOME" in shlex.split(command)


@pytest.mark.parametrize(
    ("answer", "advice"),
    [
        ("RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptible' has been exceeded. Limit: 0 in zone z.",
         "no quota for v5litepod-16, KIND=spot, in z"),
        ('{"code": 8, "message": "There is no more capacity in the zone \\"z\\""}', "QUEUED=yes waits for it"),
        ("PERMISSION_DENIED: Permission 'tpu.nodes.create' denied", "roles/tpu.admin"),
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
    for arguments in (["status"], ["stop"], ["setup"], ["delete"], ["run", CONFIG, "SHARED=/tmp"]):
        assert "error: there is no simvlg in z of p" in cloud(*arguments, status=1)
    cloud.set(fail={"describe": "PERMISSION_DENIED: Permission 'tpu.nodes.get' denied"})
    assert "roles/tpu.admin" in cloud("status", status=1)


def test_create_tells_each_state_and_why_it_failed(cloud):
    states = [line.split(": ")[1] for line in cloud("create", TYPE).splitlines()]
    assert states == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    assert "gs://mine is kept" in cloud("delete", "BUCKET=gs://mine")
    cloud.set(states=["WAITING_FOR_RESOURCES", "FAILED"], reason="Quota limit reached in zone z")
    said = cloud("create", TYPE, status=1)
    assert "Quota limit reached in zone z\nerror: no quota for v5litepod-16" in said
    assert "simvlg is FAILED: the request could not be met" in said
    cloud("delete")
    cloud.set(states=["SUSPENDED"], reason="")
    assert "simvlg is SUSPENDED: it was preempted or stopped" in cloud("create", TYPE, status=1)


def test_several_workers_need_a_shared_folder(cloud):
    cloud.set(workers=1)
    cloud("create", TYPE, "NAME=one")
    cloud.set(workers=2)
    cloud("create", TYPE, "NAME=two")
    assert "two has several workers, which need one folder" in cloud("run", CONFIG, "NAME=two", status=2)
    said = cloud("run", CONFIG, "NAME=one", status=1)
    assert "note: checkpoints lie on the slice's own disk and go with it" in said
    assert "error: not set up; first: bash launch/tpu.sh setup" in said
