"""Several processes on one CPU, as on several machines: what their number must not change, and how they stop."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
import quick_compile

from simvlg_jax.config.load import load_config
from simvlg_jax.convert import own_files
from simvlg_jax.parallel.mesh import make_mesh
from simvlg_jax.tasks import build_task
from simvlg_jax.training import loop, restore
from simvlg_jax.training.checkpoint import Checkpoints
from simvlg_jax.training.plan import Plan
from simvlg_jax.utils.errors import TRY_AGAIN

# All runs start from these weights, since initialising takes long to compile.
START = Path(tempfile.mkdtemp(prefix="simvlg_jax_start_")) / "start.safetensors"
PRESETS = ("replicated", "fsdp", "fsdp+tensor")
STEPS, SAVED = 4, 2
# Five of the drawn val pictures and 16 test pictures in batches of six: what fills up the last must not count.
SETTINGS = {
    "train.init_from": START,
    "train.steps": STEPS,
    "train.log_every": 1,
    "train.save_every": SAVED,
    "evals.val.every": STEPS,
    "evals.val.max_examples": 5,
    "evaluate.batch_size": 6,
    "evaluate.max_new_tokens": 4,
    "evaluate.min_new_tokens": 4,
    "evaluate.repetition_penalty": 9.0,  # or this hardly trained model says nothing but spaces
}


def overrides(**settings):
    merged = SETTINGS | {key.replace("__", "."): value for key, value in settings.items()}
    return [f"--config.{key}={value}" for key, value in merged.items()]


def start(count, devices, *arguments):
    """Starts one python command in `count` processes with so many CPU devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, *(arguments if isinstance(arguments[-1], str) else [*arguments[:-1], *arguments[-1][i]])],
            env=os.environ
            | {
                "XLA_FLAGS": f"{quick_compile.FLAGS} --xla_force_host_platform_device_count={devices}",
                "JAX_PLATFORMS": "cpu",
                "JAX_DEFAULT_MATMUL_PRECISION": "highest",
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(i),
                "PYTHONPATH": os.getcwd(),
            },
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for i in range(count)
    ]


def finish(processes, seconds=400):
    """Returns (exit statuses, what each process printed on stderr)."""
    with ThreadPoolExecutor(len(processes)) as pool:  # a process that nobody reads from would stop at a full pipe
        said = list(pool.map(lambda process: process.communicate(timeout=seconds)[1], processes))
    return [process.returncode for process in processes], said


def run_jobs(count, devices, jobs):
    jobs = [{"overrides": flags, "workdir": str(workdir)} for flags, workdir in jobs]
    statuses, said = finish(start(count, devices, "tests/jobs.py", json.dumps(jobs)))
    assert statuses == [0] * count, "\n".join(said)


def logged(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {(line["kind"], line["step"]): line for line in lines}


def final_params(workdir):
    return jax.device_get(restore.restore_run(load_config("configs/tiny.py", overrides()), workdir, "latest").params)


def assert_same_run(workdir, reference):
    ours, theirs = logged(workdir), logged(reference)
    assert ours.keys() | {("eval", STEPS)} == theirs.keys()
    assert (("eval", STEPS) in ours) == (workdir.name.partition(" ")[2] not in ("replicated", "fsdp"))
    for key, line in ours.items():
        assert line["loss"] == pytest.approx(theirs[key]["loss"], rel=1e-5), key
    if ("eval", STEPS) in ours:
        assert ours["eval", STEPS]["score"] == pytest.approx(theirs["eval", STEPS]["score"], abs=1e-9)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        final_params(workdir),
        final_params(reference),
    )


def preset_overrides(preset):
    """Validation takes as long to compile as training, so only one preset has it, with tensors across processes."""
    if preset == "fsdp+tensor":
        return overrides(mesh__preset=preset)
    return overrides(mesh__preset=preset, evals__val__every=0, train__save_every=STEPS)


def cut_back(workdir, copy):
    """Copies a finished run as it was after step SAVED."""
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    return copy


@pytest.fixture(scope="module", autouse=True)
def start_weights():
    config = load_config("configs/tiny.py", ["--config.mesh.data=1"])
    trained, frozen = Plan(build_task(config), config, make_mesh(config.mesh)).init_params()
    own_files.write_tree(START, trained | frozen)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs of one run done by one, two and four processes, and of runs that fewer than four processes resumed."""
    folder = tmp_path_factory.mktemp("runs")
    loop.train(load_config("configs/tiny.py", overrides(mesh__data=1)), folder / "one")
    run_jobs(4, 1, [(preset_overrides(preset), folder / f"4 {preset}") for preset in PRESETS])
    for count in (2, 1):
        cut_back(folder / "4 fsdp+tensor", folder / f"4 to {count}")
    shutil.copytree(folder / "4 fsdp+tensor", folder / "damaged")
    for path in (folder / "damaged" / "checkpoints" / str(STEPS) / "state" / "ocdbt.process_3" / "d").iterdir():
        path.unlink()  # what one of the two reads
    again = [(overrides(mesh__preset="fsdp+tensor"), folder / name) for name in ("4 to 2", "damaged")]
    run_jobs(2, 2, [*((preset_overrides(preset), folder / f"2 {preset}") for preset in PRESETS), *again])
    loop.train(load_config("configs/tiny.py", overrides(mesh__data=2)), folder / "4 to 1")
    return folder


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("preset", PRESETS)
def test_run_does_not_depend_on_the_number_of_processes(runs, count, preset):
    assert_same_run(runs / f"{count} {preset}", runs / "one")


@pytest.mark.parametrize("count", [2, 1])
def test_run_of_four_processes_is_resumed_by_fewer(runs, count):
    assert_same_run(runs / f"4 to {count}", runs / "one")


def test_damaged_checkpoint_is_passed_over_by_all_processes(runs):
    """One process cannot read its part; the other could."""
    names = {path.name for path in (runs / "damaged" / "checkpoints").iterdir()}
    assert names == {str(SAVED), str(STEPS), f"{STEPS}.damaged"}
    assert_same_run(runs / "damaged", runs / "one")


def test_all_processes_write_one_checkpoint(runs):
    assert sorted(path.name for path in (runs / "4 fsdp+tensor" / "checkpoints").iterdir()) == [str(SAVED), str(STEPS)]
    assert json.loads((runs / "4 fsdp+tensor" / "frozen.json").read_text()) == json.loads(
        (runs / "one" / "frozen.json").read_text()
    )


def test_evaluation_by_two_processes_counts_each_example_once(runs, tmp_path):
    results = []
    for count in (1, 2):
        arguments = (
            "-m",
            "simvlg_jax.evaluate",
            "--workdir",
            str(runs / "4 fsdp"),
            "--output",
            str(tmp_path / str(count)),
        )
        flag = ("--distributed",) if count > 1 else ("--split", "test")
        statuses, said = finish(start(count, 1, *arguments, *flag))
        assert statuses == [0] * count, said
        results.append(json.loads((tmp_path / str(count) / "eval" / "test.json").read_text()))
    one, two = results
    assert two["num_examples"] == len(two["examples"]) == 16
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    for key in ("id", "caption", "source_map"):
        assert [e[key] for e in two["examples"]] == [e[key] for e in one["examples"]], key
    assert len({e["caption"] for e in one["examples"]}) > 1
    assert len({tuple(e["source_map"]) for e in one["examples"]}) > 8


LONG = overrides(train__steps=40, train__save_every=40, evals__val__every=40)


def train_long(workdir, *flags):
    arguments = ("-m", "simvlg_jax.train", "--distributed", "--config", "configs/tiny.py", "--workdir", str(workdir))
    return start(2, 1, *arguments, *LONG, *flags)


def wait_for_step(workdir, step, processes):
    """Waits until the run has logged the step."""
    deadline = time.monotonic() + 200
    while not (workdir / "metrics.jsonl").exists() or ("train", step) not in logged(workdir):
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Returns the log of the long run by one process, without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    loop.train(load_config("configs/tiny.py", [*LONG, "--config.mesh.data=1"]), folder)
    return logged(folder)


def test_sigterm_to_one_saves_all_at_one_step_and_the_run_goes_on_there(tmp_path, whole):
    processes = train_long(tmp_path)
    wait_for_step(tmp_path, 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    statuses, said = finish(processes)
    assert statuses == [128 + signal.SIGTERM] * 2, said
    stopped = Checkpoints(tmp_path, read_only=True).latest()
    assert 3 <= stopped < 40 and f"stopped by SIGTERM at step {stopped} of 40" in said[0]
    assert loop.train(load_config("configs/tiny.py", [*LONG, "--config.mesh.data=2"]), tmp_path) == 0
    resumed = logged(tmp_path)
    assert resumed.keys() == whole.keys()
    assert all(line["loss"] == pytest.approx(whole[key]["loss"], rel=1e-4) for key, line in resumed.items())


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_process_stops_the_other_with_the_reason(tmp_path, victim):
    processes = train_long(tmp_path)
    wait_for_step(tmp_path, 2, processes)
    processes[victim].kill()
    statuses, said = finish(processes, seconds=120)
    survivor = 1 - victim
    # Its own end, or that of JAX's runtime, which aborts where it notices first.
    assert statuses[victim] == -signal.SIGKILL and statuses[survivor] in (TRY_AGAIN, -signal.SIGABRT)
    reasons = ("another process of this run is lost", f"process {victim} failed", "distributed service detected fatal")
    assert any(reason in said[survivor] for reason in reasons), said[survivor]


def test_error_of_one_process_stops_all_with_its_reason_and_status(tmp_path):
    arguments = ("-m", "simvlg_jax.train", "--distributed", "--config", "configs/tiny.py", "--workdir", str(tmp_path))
    processes = start(2, 1, *arguments, [["--config.train.batch_size=8"], ["--config.train.batch_size=9"]])
    statuses, said = finish(processes, seconds=120)
    assert statuses == [2, 2], said
    assert "process 1 failed, so all stop: train.batch_size 9 does not divide over 2 devices" in said[0]
    assert "Traceback" not in said[0] + said[1], said


def is_alive(pid):
    """Returns whether a process runs. A zombie does not."""
    try:
        with open(f"/proc/{pid}/cmdline") as words:
            return bool(words.read())
    except OSError:
        return False


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_signal_ends_what_cannot_be_saved_and_leaves_nothing_behind(number, status):
    """The work does not ask the preemption service. Ctrl-C in one process ends all, and SIGTERM is not swallowed."""
    processes = start(2, 1, "tests/jobs.py", "wait")
    workers = [int(process.stderr.readline()) for process in processes]
    processes[1].send_signal(number)
    assert processes[1].wait(60) == status
    if number == signal.SIGTERM:
        os.kill(workers[1], signal.SIGKILL)
        processes[0].send_signal(signal.SIGINT)
    statuses, said = finish(processes, seconds=60)
    assert statuses[0] == 130, said
    assert ("process 1 failed, so all stop: interrupted" in said[0]) == (number == signal.SIGINT)
    assert "Traceback" not in said[0] + said[1], said
    deadline = time.monotonic() + 20
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_incomplete_environment_is_named(tmp_path):
    arguments = ("-m", "simvlg_jax.train", "--distributed", "--config", "configs/tiny.py", "--workdir", str(tmp_path))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {"JAX_PLATFORMS": "cpu"}
    for extra, message in (
        ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID must be set too"),
        ({}, "--distributed finds no other processes here"),
    ):
        done = subprocess.run([sys.executable, *arguments], env=environment | extra, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
