"""
Trains on one node with GPUs, in one process with all of them or in several; under Slurm on several nodes.

  bash launch/gpu.sh CONFIG=configs/openmoji.py WORKDIR=runs/mine [KEY=VALUE ...] [--dry-run]

With several processes, process 0 prints here and process 1 into WORKDIR/process_1.log. Ctrl-C saves and stops, and the
same command resumes. In an sbatch script with one task for each GPU (--ntasks-per-node equal to --gpus-per-node) it
starts all tasks with srun. ARGS is split at blanks. --dry-run prints the commands and runs none.
"""

from __future__ import annotations

import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from keys import Key, Keys, fail, misuse, say, show_usage

KEYS = {
    "CONFIG": Key("", "the config, for example CONFIG=configs/openmoji.py", ".+"),
    "WORKDIR": Key("", "the folder of the run, for example WORKDIR=runs/mine", ".+"),
    "ARGS": Key("", "more arguments of simvlg_jax.train"),
    "DEVICE": Key("gpu", "gpu, or cpu to try it without GPUs", "gpu|cpu"),
    "PROCESSES": Key("1", "a number, at least 1; the processes get equal shares of the GPUs", "[1-9][0-9]*"),
    "PORT": Key("", "a number: where the processes meet; drawn if not given", "([1-9][0-9]*)?"),
    "GRACE": Key("60", "a number: the seconds to save before the others of a failed process are killed", "[0-9]+"),
}


def count_gpus(keys: Keys, slurm: bool) -> int:
    processes = int(keys.PROCESSES)
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        gpus = len(visible.split(","))
    elif shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
        gpus = sum(line.startswith("GPU") for line in listed.splitlines())
    else:
        gpus = 0
    if not gpus and not keys.dry_run:
        fail("nvidia-smi shows no GPU here; DEVICE=cpu tries it without")
    if not gpus:
        gpus = processes
        say(f"note: nvidia-smi shows no GPU here; assuming {gpus}, one for each process")
    if gpus % processes:
        misuse(f"{gpus} GPUs cannot be shared evenly by PROCESSES={processes}")
    tasks = int(os.environ.get("SLURM_NTASKS_PER_NODE", gpus))
    if slurm and gpus > tasks:  # JAX gives each Slurm task the one GPU of its number on the node
        fail(f"{gpus} GPUs and {tasks} tasks on a node: the others would idle; sbatch --ntasks-per-node={gpus}")
    return gpus


def variables_of_processes(keys: Keys, gpus: int) -> list[dict[str, str]]:
    # Named, the GPUs must work: no silent training on the CPU.
    common = {"JAX_PLATFORMS": "cuda,cpu" if keys.DEVICE == "gpu" else "cpu"}
    count = int(keys.PROCESSES)
    if count == 1:
        return [common]
    port = keys.PORT or random.randrange(20000, 32000)  # below what systems hand out to connections
    common |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": keys.PROCESSES}
    shares = [range(gpus * i // count, gpus * (i + 1) // count) for i in range(count)]
    own = [{"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, share))} if gpus else {} for share in shares]
    return [common | {"JAX_PROCESS_ID": str(i)} | own[i] for i in range(count)]


def start(train: list[str], variables: dict[str, str], log: Path | None) -> subprocess.Popen:
    # In a session of its own, since Ctrl-C must reach it once, from here: a second one ends it unsaved.
    output, environment = log and log.open("a"), {**os.environ, **variables}
    return subprocess.Popen(train, env=environment, stdout=output, stderr=output, start_new_session=True)


def wait_for_all(processes: list[subprocess.Popen], logs: list[Path | None], grace: int) -> int:
    """Ends all processes when one fails, since the others would wait for it. Returns the first failure's status."""
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.append(number))
    running = dict(enumerate(processes))
    first, passed_on, deadline = 0, 0, float("inf")
    while running:
        while passed_on < len(signals):
            say(f"{signal.Signals(signals[passed_on]).name}: passed on to all processes")
            for process in running.values():
                process.send_signal(signals[passed_on])
            passed_on += 1
        for i in [i for i, process in running.items() if process.poll() is not None]:
            status = running.pop(i).returncode
            if status and not first:
                first = status if status > 0 else 128 - status
                if not signals:
                    say(f"process {i} failed with exit status {first}")
                    if logs[i]:
                        end = logs[i].read_text(errors="replace").splitlines()[-20:]
                        say("\n".join([f"the end of {logs[i]}:", *end]))
                    signals.append(signal.SIGTERM)
                    deadline = time.monotonic() + grace
        for process in running.values() if time.monotonic() >= deadline else ():
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.2)
    return first


def main() -> int:
    show_usage(__doc__, KEYS, sys.argv[1:])
    keys = Keys(KEYS, sys.argv[1:])
    if not os.path.isfile(config := keys.CONFIG.partition(":")[0]):
        misuse(f"no config file {config}")
    slurm = bool(os.environ.get("SLURM_JOB_ID")) and int(os.environ.get("SLURM_NTASKS", 1)) > 1
    if slurm and keys.PROCESSES != "1":
        misuse("under Slurm its tasks are the processes: leave PROCESSES out")
    variables = variables_of_processes(keys, count_gpus(keys, slurm) if keys.DEVICE == "gpu" else 0)
    install = ["bash", "launch/environment.sh", "requirements.txt"] + ["requirements-gpu.txt"] * (keys.DEVICE == "gpu")
    train = [".venv/bin/python", "-m", "simvlg_jax.train", "--config", keys.CONFIG, "--workdir", keys.WORKDIR]
    train += ["--distributed"] * (slurm or len(variables) > 1) + keys.ARGS.split()
    if slurm:
        # Newer versions of srun do not take the number of CPUs over from sbatch, and one could not feed a GPU.
        cpus = os.environ.get("SLURM_CPUS_PER_TASK")
        train = ["srun", "--kill-on-bad-exit=1"] + [f"--cpus-per-task={cpus}"] * bool(cpus) + train
    if keys.dry_run:
        commands = [["env", *(f"{name}={value}" for name, value in own.items()), *train] for own in variables]
        print("\n".join(map(shlex.join, [install, *commands])))
        return 0
    if subprocess.run(install).returncode:
        return 1
    if len(variables) == 1:
        os.execvpe(train[0], train, {**os.environ, **variables[0]})
    os.makedirs(keys.WORKDIR, exist_ok=True)
    logs = [None] + [Path(keys.WORKDIR) / f"process_{i}.log" for i in range(1, len(variables))]
    return wait_for_all([start(train, *own) for own in zip(variables, logs, strict=True)], logs, int(keys.GRACE))


if __name__ == "__main__":
    os.chdir(Path(__file__).parent.parent)
    sys.exit(main())
