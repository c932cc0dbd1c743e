"""A stand-in for gcloud's TPU commands: slices are folders, their workers processes on this machine.

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


def main(folder: Path, arguments: list[str]) -> int:
    with open(folder / "calls.jsonl", "a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    if arguments[:2] == ["config", "get-value"]:
        value = _settings(folder).get(arguments[2])
        print(value or "(unset)", file=sys.stdout if value else sys.stderr)
        return 0
    name, words, flags = _parse(arguments)
    for part, message in _settings(folder).get("fail", {}).items():
        if part in name:
            return _error(name, message)
    if name in ("tpu-vm ssh", "tpu-vm scp"):  # these take long and change no resource
        return (_ssh if name == "tpu-vm ssh" else _scp)(folder, words, flags)
    with changing(folder) as resources:
        return _change(folder, name, words[0], flags, resources)


@contextlib.contextmanager
def changing(folder: Path):
    """The resources, as {"tpu-vm NAME": {"state": ...}}, to read and to change."""
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = folder / "resources.json"
        resources = json.loads(path.read_text()) if path.exists() else {}
        yield resources
        path.write_text(json.dumps(resources))


def preempt(folder: Path, name: str, noticed: bool = True) -> None:
    """What happens to a spot slice: its machines are gone at once; a request in the queue stays and is SUSPENDED.

    Args:
      noticed: False when the request does not show it yet, and only its nodes do.
    """
    with changing(folder) as resources:
        queued = resources.get(f"queued-resources {name}")
        nodes = queued["nodes"] if queued else [name]
        for node in nodes:
            resources[f"tpu-vm {node}"]["states"] = ["PREEMPTED"]
            kill_processes(folder, node)
        if queued and noticed:
            queued["states"] = ["SUSPENDED"]
            for node in nodes:
                _remove_node(folder, node, resources)


def kill_processes(folder: Path, node: str, worker: str = "*") -> None:
    """SIGKILL to all that training runs on a node's workers, or on one of them."""
    for path in (folder / node).glob(f"worker_{worker}/simvlg_jax/state/*.loop"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(path.read_text()), signal.SIGKILL)
        path.unlink()


def _settings(folder: Path) -> dict:
    path = folder / "settings.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _error(name: str, message: str) -> int:
    print(f"ERROR: (gcloud.compute.tpus.{name.replace(' ', '.')}) {message}", file=sys.stderr)
    return 1


def _parse(arguments: list[str]) -> tuple[str, list[str], dict[str, str]]:
    alpha = arguments[0] == "alpha"
    arguments = arguments[alpha:]
    name = " ".join(arguments[2:4])
    assert arguments[:2] == ["compute", "tpus"] and name in FLAGS, arguments
    words = [a for a in arguments[4:] if not a.startswith("--")]
    flags = dict(a[2:].partition("=")[::2] for a in arguments[4:] if a.startswith("--"))
    unknown = flags.keys() - FLAGS[name] - COMMON - (ALPHA.get(arguments[3], set()) if alpha else set())
    assert not unknown, f"{name} has no flags {unknown}"
    assert {"zone", "project"} <= flags.keys() and len(words) == (2 if name == "tpu-vm scp" else 1), arguments
    return name, words, flags


def _change(folder: Path, name: str, resource: str, flags: dict[str, str], resources: dict) -> int:
    kind, verb = name.split()
    key = f"{kind} {resource}"
    if verb == "create":
        if key in resources:
            return _error(name, f"ALREADY_EXISTS: Resource '{resource}' already exists")
        nodes = [resource]
        if "node-count" in flags:
            nodes = [f"{flags['node-prefix']}-{i}" for i in range(int(flags["node-count"]))]
        if kind == "queued-resources":
            states = _settings(folder).get("states", ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
            resources[key] = {"states": states, "nodes": nodes}
        for node in nodes:
            _add_node(folder, node, resources)
        return 0
    if key not in resources:
        return _error(name, f"NOT_FOUND: Resource 'projects/p/locations/z/{resource}' was not found")
    if verb == "describe":
        states = resources[key]["states"]
        said = {
            "value(state)": states[0],
            "value(state.state)": states[0],
            "value(state.failedData.error.message)": _settings(folder).get("reason", ""),
            "value(networkEndpoints.len())": resources[key].get("workers"),
        }
        print(said[flags["format"]])
        if "state" in flags["format"] and len(states) > 1:
            del states[0]
        return 0
    if kind == "queued-resources":
        assert "force" in flags, "a queued resource with nodes is only deleted with --force"
        for node in resources[key]["nodes"]:
            _remove_node(folder, node, resources)
    else:
        _remove_node(folder, resource, resources)
    resources.pop(key, None)
    return 0


def _add_node(folder: Path, node: str, resources: dict) -> None:
    workers = _settings(folder).get("workers", 2)
    resources[f"tpu-vm {node}"] = {"states": ["READY"], "workers": workers}
    for i in range(workers):
        home = folder / node / f"worker_{i}"
        if (folder / "home").exists():
            shutil.copytree(folder / "home", home, symlinks=True, dirs_exist_ok=True)
        else:
            home.mkdir(parents=True, exist_ok=True)


def _remove_node(folder: Path, node: str, resources: dict) -> None:
    if resources.pop(f"tpu-vm {node}", None):
        kill_processes(folder, node)
        while (folder / node).exists():  # a command that is still running may write there
            shutil.rmtree(folder / node, ignore_errors=True)


def _homes(folder: Path, node: str, worker: str) -> list[Path]:
    with changing(folder) as resources:
        if f"tpu-vm {node}" not in resources:
            return []
    homes = sorted((folder / node).glob("worker_*"))
    return homes if worker == "all" else [homes[int(worker)]]


def _scp(folder: Path, words: list[str], flags: dict[str, str]) -> int:
    node, _, target = words[1].partition(":")
    homes = _homes(folder, node, flags.get("worker", "0"))
    for home in homes:
        shutil.copy(words[0], home / target)
    return 0 if homes else _error("tpu-vm scp", f"NOT_FOUND: Resource '{node}' was not found")


def _ssh(folder: Path, words: list[str], flags: dict[str, str]) -> int:
    """Runs the command with each worker's home; the environment tells JAX what a TPU VM's metadata would.

    With the setting "runs" so many times, as when a connection breaks at the command's end.
    """
    homes = _homes(folder, words[0], flags.get("worker", "0"))
    if not homes:
        return _error("tpu-vm ssh", f"NOT_FOUND: Resource '{words[0]}' was not found")
    with changing(folder) as resources:
        if (state := resources[f"tpu-vm {words[0]}"]["states"][0]) == "PREEMPTED":
            return _error("tpu-vm ssh", f'This TPU has terminal state "{state}", so it cannot be used anymore.')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    count = len(list(homes[0].parent.glob("worker_*")))
    processes = []
    for home in homes:
        index = home.name.removeprefix("worker_")
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "HOSTNAME": f"{words[0]}-w-{index}",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": index,
            **_settings(folder).get("environment", {}),
        }
        command = ["bash", "-c", "; ".join([f"({flags['command']})"] * _settings(folder).get("runs", 1))]
        processes.append(subprocess.Popen(command, cwd=home, env=environment, stdin=subprocess.DEVNULL))
    statuses = [process.wait() for process in processes]
    for i, status in enumerate(statuses):
        if status and len(statuses) > 1:
            message = f"##### Command execution on worker {i} failed with exit status {status}. Continuing."
            print(message, file=sys.stderr)
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
