"""A stand-in for gcloud's TPU commands. A slice is a folder, and its workers are processes on this machine.

    python standin_gcloud.py FOLDER compute tpus ...

FOLDER holds everything: calls.jsonl (the arguments of each call), resources.json (what exists and in which state),
settings.json (what the test wants) and NODE/worker_0, NODE/worker_1, ... (the home of each worker, a copy of the folder
"home" if there is one). Unknown commands and flags are errors, as with the real one.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

COMMON = {"zone", "project", "quiet"}
CREATE = {"accelerator-type", "spot", "reserved", "network", "internal-ips"}
FLAGS = {
    "queued-resources create": {*CREATE, "runtime-version", "node-id", "node-count", "node-prefix"},
    "queued-resources describe": {"format"},
    "queued-resources delete": {"force"},
    "tpu-vm create": {*CREATE, "version"},
    "tpu-vm describe": {"format"},
    "tpu-vm delete": set(),
    "tpu-vm ssh": {"worker", "command", "internal-ip"},
    "tpu-vm scp": {"worker", "internal-ip"},
}
ALPHA = {"create": {"autocheckpoint-enabled"}, "ssh": {"tunnel-through-iap"}, "scp": {"tunnel-through-iap"}}


class Refused(Exception):
    """An error that gcloud reports."""


def main(folder: Path, arguments: list[str]) -> int:
    with open(folder / "calls.jsonl", "a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    settings = _settings(folder)
    if arguments[:2] == ["config", "get-value"]:
        print(settings.get(arguments[2], ""))
        return 0
    alpha = arguments[0] == "alpha"
    kind, verb, *rest = arguments[2 + alpha :]
    words = [word for word in rest if not word.startswith("--")]
    flags = dict(word[2:].partition("=")[::2] for word in rest if word.startswith("--"))
    unknown = flags.keys() - FLAGS[f"{kind} {verb}"] - COMMON - (ALPHA.get(verb, set()) if alpha else set())
    assert not unknown, f"{kind} {verb} has no flags {unknown}"
    assert {"zone", "project"} <= flags.keys() and len(words) == (2 if verb == "scp" else 1), arguments
    try:
        if message := settings.get("fail", {}).get(verb):
            raise Refused(message)
        if verb in ("ssh", "scp"):  # these take long and change no resource
            return (_ssh if verb == "ssh" else _scp)(folder, words, flags)
        with changing(folder) as resources:
            _change(folder, kind, verb, words[0], flags, resources)
    except Refused as error:
        print(f"ERROR: (gcloud.compute.tpus.{kind}.{verb}) {error}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def changing(folder: Path):
    """The resources, as {"tpu-vm NAME": {"states": [...]}}, to read and to change."""
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = folder / "resources.json"
        resources = json.loads(path.read_text()) if path.exists() else {}
        yield resources
        path.write_text(json.dumps(resources))


def preempt(folder: Path, name: str, noticed: bool = True) -> None:
    """Preempts a spot slice: its machines are gone at once. A request in the queue stays and becomes SUSPENDED.

    Args:
      noticed: whether the request shows the preemption already; otherwise only its nodes do.
    """
    with changing(folder) as resources:
        queued = resources.get(f"queued-resources {name}")
        for node in queued["nodes"] if queued else [name]:
            resources[f"tpu-vm {node}"]["states"] = ["PREEMPTED"]
            kill_processes(folder, node)
            if queued and noticed:
                _remove_node(folder, node, resources)
        if queued and noticed:
            queued["states"] = ["SUSPENDED"]


def kill_processes(folder: Path, node: str, worker: str = "*") -> None:
    """Sends SIGKILL to all training processes on a node's workers, or on one of them."""
    for path in (folder / node).glob(f"worker_{worker}/simvlg_jax/state/*.loop"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(path.read_text()), signal.SIGKILL)
        path.unlink()


def _settings(folder: Path) -> dict:
    path = folder / "settings.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _change(folder: Path, kind: str, verb: str, name: str, flags: dict[str, str], resources: dict) -> None:
    key = f"{kind} {name}"
    if (key in resources) == (verb == "create"):
        raise Refused(f"ALREADY_EXISTS: {name}" if verb == "create" else f"NOT_FOUND: {name} was not found")
    if verb == "create":
        count = int(flags.get("node-count", 0))
        nodes = [f"{flags['node-prefix']}-{i}" for i in range(count)] or [name]
        if kind == "queued-resources":
            states = _settings(folder).get("states", ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
            resources[key] = {"states": states, "nodes": nodes}
        for node in nodes:
            _add_node(folder, node, resources)
    elif verb == "describe":
        states, field = resources[key]["states"], flags["format"]
        if "failedData" in field:
            print(_settings(folder).get("reason", ""))
        elif "networkEndpoints" in field:
            print(resources[key]["workers"])
        else:
            assert field == ("value(state.state)" if kind == "queued-resources" else "value(state)")
            print(states.pop(0) if len(states) > 1 else states[0])
    else:
        assert kind == "tpu-vm" or "force" in flags, "a queued resource with nodes is only deleted with --force"
        for node in resources[key].get("nodes", [name]):
            _remove_node(folder, node, resources)
        resources.pop(key, None)


def _add_node(folder: Path, node: str, resources: dict) -> None:
    workers = _settings(folder).get("workers", 2)
    resources[f"tpu-vm {node}"] = {"states": ["READY"], "workers": workers}
    (folder / "home").mkdir(exist_ok=True)
    for i in range(workers):
        shutil.copytree(folder / "home", folder / node / f"worker_{i}", symlinks=True, dirs_exist_ok=True)


def _remove_node(folder: Path, node: str, resources: dict) -> None:
    if resources.pop(f"tpu-vm {node}", None):
        kill_processes(folder, node)
        while (folder / node).exists():  # a command that is still running may write there
            shutil.rmtree(folder / node, ignore_errors=True)


def _homes(folder: Path, node: str, worker: str) -> list[Path]:
    with changing(folder) as resources:
        if f"tpu-vm {node}" not in resources:
            raise Refused(f"NOT_FOUND: {node} was not found")
        if (state := resources[f"tpu-vm {node}"]["states"][0]) == "PREEMPTED":
            raise Refused(f'This TPU has terminal state "{state}", so it cannot be used anymore.')
    homes = sorted((folder / node).glob("worker_*"))
    return homes if worker == "all" else [homes[int(worker)]]


def _scp(folder: Path, words: list[str], flags: dict[str, str]) -> int:
    node, _, target = words[1].partition(":")
    for home in _homes(folder, node, flags["worker"]):
        shutil.copy(words[0], home / target)
    return 0


def _ssh(folder: Path, words: list[str], flags: dict[str, str]) -> int:
    """Runs the command in each worker's home. The environment tells JAX what the metadata of a TPU VM would.

    The setting "runs" is how often the command runs, as if connections broke at the end of a command.
    """
    settings = _settings(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for home in _homes(folder, words[0], flags["worker"]):
        index = home.name.removeprefix("worker_")
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "HOSTNAME": f"{words[0]}-w-{index}",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(len(list(home.parent.glob("worker_*")))),
            "JAX_PROCESS_ID": index,
            **settings.get("environment", {}),
        }
        command = ["bash", "-c", "; ".join([f"({flags['command']})"] * settings.get("runs", 1))]
        processes.append(subprocess.Popen(command, cwd=home, env=environment, stdin=subprocess.DEVNULL))
    return max([process.wait() for process in processes])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
