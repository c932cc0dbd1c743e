"""Whole runs of launch/tpu.sh on a stand-in for gcloud: killed, preempted, rebooted, watched, stopped."""

import os
import signal

import pytest
import quick_compile
import standin_gcloud
from launching import CONFIG, FAKE_TRAINING, TYPE, WAIT_SECONDS, read, until


def test_killed_run_resumes_on_two_workers(cloud, tmp_path):
    """The real training program: both workers are killed during a run, and the same command resumes and finishes it."""
    cached = {name: os.environ[name] for name in os.environ if name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    cloud.set(environment={"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick_compile.FLAGS, **cached})
    cloud.prepare_homes()
    shared = tmp_path / "shared"
    checkpoints = shared / "runs" / "simvlg" / "checkpoints"
    saved = checkpoints / "5" / "commit_success.txt"
    overrides = "ARGS=--config.train.steps=30 --config.train.save_every=5 --config.evals.val.every=30"
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


@pytest.fixture
def ready(cloud, tmp_path):
    """Returns the arguments of `run` on a slice that is set up, with a fake training program."""
    cloud.prepare_homes(FAKE_TRAINING)
    keys = [TYPE, f"SHARED={tmp_path / 'shared'}"]
    cloud("create", *keys)
    cloud("setup", *keys)
    return ["run", CONFIG, *keys]


def test_watch_makes_a_preempted_slice_again(cloud, ready, tmp_path):
    watch = cloud.start(*ready, "WATCH=yes", "ARGS=--steps=120")
    until(lambda: int(read(tmp_path / "shared" / "runs" / "simvlg" / "step_1") or 0) > 5)
    standin_gcloud.preempt(cloud.folder, "simvlg")
    said = watch.communicate(timeout=WAIT_SECONDS)[0]
    assert watch.returncode == 0, said
    words = [line.split("simvlg: ")[1] for line in said.splitlines() if "simvlg: " in line]
    states = ["SUSPENDED", "ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING"]
    expected = [f"{state}, the run: unknown" for state in states]
    expected += [f"ACTIVE, the run: {result}" for result in ("none", "running", "done")]
    assert words[-len(expected) :] == expected
    assert "resuming at step" in cloud.log(1)


def test_watch_gives_up_when_nothing_helps(cloud, ready):
    cloud.set(states=["FAILED"], reason="Quota limit reached in zone z")
    watch = cloud.start(*ready, "WATCH=yes", "POLL=0")
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


def test_watch_ends_when_the_run_is_stopped_or_the_slice_deleted(cloud, ready):
    for verb, message in (("stop", "the run ended: stopped"), ("delete", "simvlg is not there any more")):
        watch = cloud.start(*ready, "WATCH=yes")
        assert any("watching" in line for line in watch.stdout)
        cloud(verb)
        said = watch.communicate(timeout=WAIT_SECONDS)[0]
        assert watch.returncode == 1
        assert message in said
    assert len(cloud.created) == 1


def test_several_slices_start_together(cloud, tmp_path):
    cloud.set(workers=1)
    cloud.prepare_homes(FAKE_TRAINING)
    keys = ["SLICES=2", f"SHARED={tmp_path / 'shared'}", "SSH_FLAGS=--tunnel-through-iap"]
    cloud("create", TYPE, *keys)
    cloud("setup", *keys)
    assert any("scp" in call and call[0] == "alpha" for call in cloud.calls)
    cloud("run", CONFIG, *keys, "ARGS=--steps=3", "FOLLOW=no")
    for node in ("simvlg-0", "simvlg-1"):
        log = cloud.home(0, node) / "logs" / "simvlg.log"
        assert until(lambda log=log: "the run ends: done" in read(log))
    assert "simvlg-0-w-0: done" in cloud("status", *keys)


def test_ctrl_c_leaves_the_run_going(cloud, ready):
    process = cloud.start(*ready)
    assert any("new run" in line for line in process.stdout)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=WAIT_SECONDS)[0]
    assert process.returncode == 130
    assert "the run goes on" in said and "Traceback" not in said
    assert "simvlg-w-0: running" in cloud("status")
    cloud("stop")
    assert "simvlg-w-1: stopped" in cloud("status")
