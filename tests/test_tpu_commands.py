"""launch/tpu.sh: its words and flags, what it asks gcloud to do, and what it makes of the answers."""

import shlex
import shutil

import pytest
from launching import (
    CONFIG,
    PLACE,
    ROOT,
    TYPE,
    git,
)


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
