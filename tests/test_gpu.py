"""launch/gpu.sh: one node, several processes, Slurm."""

import os
import shlex
import shutil
import signal
import subprocess

import pytest
from launching import CONFIG, FAKE_TRAINING, ROOT, WAIT_SECONDS, executable, make_environment, until

RUN = (CONFIG, "WORKDIR=run")
CPU = (*RUN, "DEVICE=cpu")


@pytest.fixture
def node(tmp_path):
    """Returns launch/gpu.sh with a fake training program, on a node without GPUs."""
    folder = tmp_path / "node"
    shutil.copytree(ROOT / "launch", folder / "launch")
    for name in ("requirements.txt", "requirements-gpu.txt"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "configs").mkdir()
    (folder / "configs" / "tiny.py").touch()
    make_environment(folder / ".venv", ("requirements.txt",), FAKE_TRAINING)
    executable(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\nexit 9\n")

    def start(*arguments: str, **variables: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", "launch/gpu.sh", *arguments],
            cwd=folder,
            env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def call(*arguments: str, status: int = 0, **variables: str) -> str:
        process = start(*arguments, **variables)
        said = process.communicate(timeout=WAIT_SECONDS)[0]
        assert process.returncode == status, said
        return said

    call.start, call.folder, call.bin = start, folder, tmp_path / "bin"
    return call


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ((), 2, "bash launch/gpu.sh CONFIG="),
        (("WORKDIR=run",), 2, "CONFIG is missing"),
        ((CONFIG,), 2, "WORKDIR is missing"),
        (("CONFIG=configs/none.py:a", "WORKDIR=run"), 2, "no config file configs/none.py"),
        ((*CPU, "PROCESSES=0"), 2, "PROCESSES cannot be '0'"),
        ((*RUN, "DEVICE=tpu"), 2, "DEVICE cannot be 'tpu': gpu, or cpu"),
        ((*CPU, "STEPS=3"), 2, "unknown key 'STEPS'"),
        (RUN, 1, "nvidia-smi shows no GPU here; DEVICE=cpu tries it without"),
    ],
)
def test_gpu_wrong_arguments(node, arguments, status, message):
    said = node(*arguments, status=status)
    assert message in said
    assert said.count("error:") == (1 if arguments else 0)


def test_gpu_dry_run_shares_the_gpus(node):
    def shares(*arguments: str, **variables: str) -> list[str]:
        words = shlex.split(node(*RUN, *arguments, "--dry-run", **variables))
        return [word.partition("=")[2] for word in words if word.startswith("JAX_LOCAL_DEVICE_IDS=")]

    assert shares("PROCESSES=2") == ["0", "1"]  # one assumed for each
    executable(node.bin / "nvidia-smi", '#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: H200"; done\n')
    assert shares("PROCESSES=2") == ["0,1", "2,3"]
    assert shares("PROCESSES=2", CUDA_VISIBLE_DEVICES="5,7") == ["0", "1"]
    assert shares() == []
    assert "4 GPUs cannot be shared evenly by PROCESSES=3" in node(*RUN, "PROCESSES=3", status=2)
    said = node(*RUN, "PROCESSES=2", "--dry-run")
    assert said.count("JAX_PLATFORMS=cuda,cpu ") == said.count(" --distributed") == 2
    assert "requirements-gpu.txt" in said and not (node.folder / "run").exists()


def test_gpu_one_process(node):
    said = node(*CPU, "ARGS=--steps=2")
    assert "process 0 of 1, new run\nvariables {'JAX_PLATFORMS': 'cpu'}" in said
    assert "resuming at step 2" in node(*CPU, "ARGS=--steps=3")
    node(*CPU, "ARGS=--fail=0:3", status=3)


def test_gpu_slurm_starts_with_srun(node):
    executable(node.bin / "srun", '#!/bin/sh\necho "srun $*"\nshift 2\nexec "$@"\n')
    slurm = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "12"}
    said = node(*CPU, "ARGS=--steps=2", **slurm)
    assert "--cpus-per-task=12" in said and "--distributed" in said and "process 0 ends at step 2" in said
    assert "srun" not in node(*CPU, "ARGS=--steps=2", **(slurm | {"SLURM_NTASKS": "1"}))
    assert "its tasks are the processes" in node(*CPU, "PROCESSES=2", status=2, **slurm)
    executable(node.bin / "nvidia-smi", '#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: H200"; done\n')
    assert "sbatch --ntasks-per-node=4" in node(*RUN, status=1, **slurm)


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
