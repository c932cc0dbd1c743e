"""Allows one training at a time in a workdir, on one machine or on a disk that several machines share."""

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from simvlg_jax.utils.errors import TRY_AGAIN, UserError

LOCK, OWNER = "run.lock", "run.owner.json"
BEAT_SECONDS = 10.0  # how often the owner renews its file
# A file of another machine that is not renewed for this long is stale. Mounted buckets may show a file 60 s late.
PATIENCE_SECONDS = 90.0
BOOT = Path("/proc/sys/kernel/random/boot_id")


class RunLock:
    """The claim of this process on a workdir; see `hold`."""

    def __init__(self, workdir: Path):
        self._path = workdir / OWNER
        self._identity = {**_machine(), "process": os.getpid(), "started": time.time_ns()}
        self._beats = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def check(self) -> None:
        """Raises UserError if another process has taken over the workdir, which can happen if locks are per machine.

        It is called before each write, so that two runs never mix their checkpoints and metrics.
        """
        owner = _read(self._path)
        if owner is not None and not self._is_ours(owner):
            raise UserError(
                f"{_name(owner)} has started to train in {self._path.parent} too; this process stops without saving. "
                "Start again in another --workdir"
            )

    def start(self) -> None:
        self._write()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        owner = _read(self._path)
        if owner is None or self._is_ours(owner):
            self._path.unlink(missing_ok=True)

    def _is_ours(self, owner: dict) -> bool:
        return all(owner.get(key) == value for key, value in self._identity.items())

    def _write(self) -> None:
        self._beats += 1
        partial = self._path.with_name(f".{OWNER}.{self._identity['started']}")  # another owner's has another name
        partial.write_text(json.dumps({**self._identity, "beats": self._beats}))
        partial.replace(self._path)

    def _renew(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            owner = _read(self._path)
            if owner is not None and not self._is_ours(owner):
                return  # `check` raises
            with contextlib.suppress(OSError):  # a full or unreachable disk: the next beat tries again
                self._write()


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[RunLock]:
    """Holds a workdir, which must exist, until the block or this process ends.

    A file lock of the operating system keeps out other processes of this machine, and those of other machines if the
    file system supports it. For other file systems, a file names the owner and is renewed every BEAT_SECONDS.

    Raises:
      UserError (status TRY_AGAIN): another process trains in the workdir. The message gives its host and process id.
        The files of a dead process are ignored; if it ran on another machine, this takes PATIENCE_SECONDS.
    """
    with (workdir / LOCK).open("a") as file:
        locks = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _refusal(workdir, _read(workdir / OWNER)) from None
        except OSError:  # a file system without locks
            locks = False
        owner = _read(workdir / OWNER)
        if owner is not None and not (locks and owner.items() >= _machine().items()):
            _wait_until_stale(workdir, owner)
        lock = RunLock(workdir)
        lock.start()
        try:
            yield lock
        finally:
            lock.stop()


def _wait_until_stale(workdir: Path, owner: dict) -> None:
    """Raises UserError if the owner's file is renewed within PATIENCE_SECONDS."""
    print(
        f"{_name(owner)} has trained in {workdir}: waiting up to {PATIENCE_SECONDS:.0f} s to see whether it still does",
        file=sys.stderr,
        flush=True,
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(0.5, PATIENCE_SECONDS / 10))
        now = _read(workdir / OWNER)
        if now is None and not (workdir / OWNER).exists():
            return
        if now is not None and now != owner:
            raise _refusal(workdir, now)


def _read(path: Path) -> dict | None:
    """Returns the owner's host, process, start time and beats, or None if the file is missing or truncated."""
    try:
        owner = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) else None


def _name(owner: dict | None) -> str:
    return f"process {owner.get('process')} on {owner.get('host')}" if owner else "another process"


def _refusal(workdir: Path, owner: dict | None) -> UserError:
    """Returns the error. Its status is TRY_AGAIN, since the other process may be saving its last checkpoint."""
    return UserError(
        f"{_name(owner)} is training in {workdir}: wait for it or stop it, or use another --workdir", TRY_AGAIN
    )


def _machine() -> dict[str, str]:
    """Returns what identifies this machine: its name and its boot id, since names may be equal."""
    with contextlib.suppress(OSError):
        return {"host": socket.gethostname(), "boot": BOOT.read_text().strip()}
    return {"host": socket.gethostname()}
