"""Kills a command at random moments, starts it again, and compares the result with that of an undisturbed one.

    python tests/kill_series.py FOLDER --kills 50 [--workers 2] [--processes 2] [--seed 1]
    python tests/kill_series.py FOLDER --kills 10 --verb export
    python tests/kill_series.py FOLDER --kills 10 --verb prepare

For training it compares metrics.jsonl except timings, all arrays of the last checkpoint and the position of the data.
For exporting and preparing it compares all that they write. It prints each kill, and exits with 1 at the first
difference.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import quick_compile

SETTINGS = {
    "mesh.data": -1,
    "train.batch_size": 16,
    "train.log_every": 1,
    "train.save_every": 4,
    "evals.val.every": 6,
    "data.flip": True,
    "data.pack": 2,
    "data.pack_window": 4,
    "data.synthetic_size.val": 48,
    "connector.dropout": 0.1,
}
FIRST_STEP = "first step of this start"
STARTED_SHARE = 0.7  # of the kills of a training come after its first step
TIMINGS = (
    *("seconds", "images_per_second", "tflops", "memory_gb"),
    *("data_wait", "queue_depth", "read_ms", "decode_ms"),
)
MODULE = {"train": "simvlg_jax.train", "export": "simvlg_jax.export", "prepare": "simvlg_jax.data.prepare"}


class Work:
    """A verb with its arguments, run by one process or several.

    Args:
      folder: gets the output of each process, and the compiler's cache unless the environment names one.
    """

    def __init__(self, folder: Path, verb: str, arguments: list[str], processes: int = 1):
        self._command = [sys.executable, "-m", MODULE[verb], *arguments] + ["--distributed"] * (processes > 1)
        self._folder, self._count = folder, processes

    def start(self) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = os.environ | {
            "XLA_FLAGS": quick_compile.FLAGS,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(self._folder / "compiled")),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
        if self._count > 1:
            environment |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(self._count)}
        started = []
        for index in range(self._count):
            said = (self._folder / f"said-{index}.txt").open("w")
            own = {"JAX_PROCESS_ID": str(index)} if self._count > 1 else {}
            started.append(subprocess.Popen(self._command, stdout=said, stderr=said, env=environment | own))
        return started

    def said(self) -> str:
        return "".join((self._folder / f"said-{index}.txt").read_text() for index in range(self._count))

    def _wait(self, processes: list[subprocess.Popen], until: Callable[[], bool]) -> float:
        """Waits until `until` is true or all processes have ended; returns the seconds."""
        start = time.monotonic()
        while not until() and any(process.poll() is None for process in processes):
            time.sleep(0.002)
        return time.monotonic() - start

    def is_started(self) -> bool:
        """Returns whether a training has taken its first step."""
        return FIRST_STEP in self.said()

    def finish(self) -> tuple[float, float]:
        """Runs the verb undisturbed; returns the seconds up to a training's first step, and those after it."""
        processes = self.start()
        seconds = self._wait(processes, self.is_started), self._wait(processes, lambda: False)
        statuses = [process.wait() for process in processes]
        assert statuses == [0] * self._count, self.said()
        return seconds

    def kill_after(self, seconds: float, victim: int, started: bool = False) -> bool:
        """Starts the verb and kills one process with SIGKILL; returns False if it had finished before.

        The other processes end by themselves, or are killed after 20 s, as by a job controller.

        Args:
          seconds: from the start until the kill; with `started`, from the first step of a training.
        """
        processes = self.start()
        if started:
            self._wait(processes, self.is_started)
        deadline = time.monotonic() + seconds
        self._wait(processes, lambda: time.monotonic() >= deadline)
        done = all(process.poll() == 0 for process in processes)
        processes[victim].kill()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            process.wait()
        return not done


def moment(workdir: Path, said: str) -> str:
    """Returns what a killed training was doing, judged by its output and its files."""
    checkpoints = workdir / "checkpoints"
    unfinished = [p for p in checkpoints.glob("*") if p.is_dir() and not (p / "commit_success.txt").exists()]
    if unfinished:
        return "saving"
    return "steps or evaluating" if FIRST_STEP in said else "start-up"


def saved_step(workdir: Path) -> int:
    """Returns the step of the newest checkpoint, or 0 if there is none."""
    return max([int(path.parent.name) for path in (workdir / "checkpoints").glob("*/commit_success.txt")], default=0)


def lines_of(workdir: Path) -> list[dict]:
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMINGS} for record in records]


def assert_same_training(workdir: Path, reference: Path, steps: int) -> None:
    """Compares metrics, fingerprints of all arrays that are read back, the data's position, and names of files."""
    from simvlg_jax.training.fingerprints import array_fingerprints

    ours, theirs = lines_of(workdir), lines_of(reference)
    assert ours == theirs, [pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]][:3]
    assert len(ours) == steps + steps // SETTINGS["evals.val.every"]
    states = [read_state(folder, steps) for folder in (workdir, reference)]
    assert array_fingerprints(states[0]["state"]) == array_fingerprints(states[1]["state"])
    assert states[0]["data"] == states[1]["data"]
    names = [{path.name for path in (folder / "checkpoints").iterdir()} for folder in (workdir, reference)]
    assert names[0] == names[1], names


def read_state(workdir: Path, step: int) -> dict:
    """Returns a checkpoint of any number of processes as numpy arrays, and the data's position."""
    import jax
    import orbax.checkpoint as ocp

    folder = (workdir / "checkpoints" / str(step)).resolve()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(folder / "state").item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = reader.restore(folder / "state", args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {"state": state, "data": json.loads((folder / "data" / "metadata").read_text())}


def contents_of(folder: Path, verb: str) -> dict[str, str]:
    """Returns {name: SHA-256} of what was written: of the bytes of exported files, of the records of prepared splits.

    Bytes of prepared splits differ each time, since ArrayRecord compresses in several threads.
    """
    from ml_collections import ConfigDict

    from simvlg_jax.data.sources import load_source

    if verb == "export":
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.*")}
    if not (folder / "openmoji").is_dir() or not list(folder.glob("openmoji/*/dataset_info.json")):
        return {}
    config = ConfigDict({"name": "openmoji", "dir": str(folder)})
    records = {split: hashlib.sha256() for split in ("train", "val", "test", "novel")}
    for split, digest in records.items():
        for record in load_source(config, split):
            digest.update(repr(sorted(record.items())).encode())
    return {split: digest.hexdigest() for split, digest in records.items()}


def kill_training(
    folder: Path, kills: int, workers: int = 0, processes: int = 1, seed: int = 0, steps: int = 60
) -> collections.Counter:
    """Kills trainings until there are `kills` kills, over several runs; returns how many there were at which moment."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = SETTINGS | {"data.workers": workers, "train.steps": steps}
    flags = ["--config", "configs/tiny.py", *(f"--config.{key}={value}" for key, value in settings.items())]

    def work(name: str) -> Work:
        return Work(folder, "train", [*flags, "--workdir", str(folder / name)], processes)

    work("warm").finish()  # fills the compiler's cache, so that the next one takes as long as those to come
    seconds = work("reference").finish()
    print(f"undisturbed: {seconds[0]:.1f} s to the first step, {seconds[1]:.1f} s after it", flush=True)
    assert_same_training(folder / "warm", folder / "reference", steps)
    rng, moments, number = np.random.default_rng(seed), collections.Counter(), 0
    while sum(moments.values()) < kills:
        workdir = folder / f"run-{number}"
        killed = 0
        while sum(moments.values()) < kills:
            run = work(workdir.name)
            started = rng.random() < STARTED_SHARE
            left = 1 - saved_step(workdir) / steps  # or runs that go on from a late step are done before the kill
            after = rng.uniform(0, seconds[started] * (left if started else 1))
            if not run.kill_after(after, int(rng.integers(processes)), started):
                break
            killed += 1
            what = moment(workdir, run.said())
            moments[what] += 1
            print(f"kill {sum(moments.values())} after {after:.2f} s: {what}", flush=True)
        work(workdir.name).finish()
        assert_same_training(workdir, folder / "reference", steps)
        print(f"run {number}: killed {killed} times, equal to the undisturbed one", flush=True)
        shutil.rmtree(workdir)
        number += 1
    return moments


def kill_files(folder: Path, verb: str, kills: int, seed: int) -> None:
    """Kills exporting or preparing. Every file must be whole or absent, and the same command must complete them."""
    folder.mkdir(parents=True, exist_ok=True)
    if verb == "export":
        arguments = ["--config", "configs/tiny.py", "--config.train.steps=4", "--config.mesh.data=1"]
        Work(folder, "train", [*arguments, "--workdir", str(folder / "run")]).finish()

    def work(name: str) -> Work:
        output = ["--output"] if verb == "export" else ["--data_dir"]
        own = ["--workdir", str(folder / "run")] if verb == "export" else []
        return Work(folder, verb, [*own, *output, str(folder / name)])

    work("warm").finish()
    seconds = sum(work("reference").finish())
    whole = contents_of(folder / "reference", verb)
    assert whole and contents_of(folder / "warm", verb) == whole
    rng = np.random.default_rng(seed)
    print(f"undisturbed: {seconds:.1f} s, {len(whole)} parts", flush=True)
    for number in range(kills):
        output = folder / f"output-{number}"
        after = rng.uniform(0.5 * seconds, seconds)  # the first half is starting up
        killed = work(output.name).kill_after(after, 0)
        found = contents_of(output, verb)
        assert found.items() <= whole.items(), (found, whole)
        work(output.name).finish()
        assert contents_of(output, verb) == whole
        print(f"kill {number + 1} after {after:.2f} s{'' if killed else ' (was done)'}: completed", flush=True)
        shutil.rmtree(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verb", choices=MODULE, default="train")
    arguments = parser.parse_args()
    if arguments.verb == "train":
        moments = kill_training(
            arguments.folder, arguments.kills, arguments.workers, arguments.processes, arguments.seed
        )
        print(", ".join(f"{what} {count}" for what, count in moments.items()))
    else:
        kill_files(arguments.folder, arguments.verb, arguments.kills, arguments.seed)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    main()
