"""What can be done to a slice: it is requested, set up, started, looked at, stopped and deleted."""

from __future__ import annotations

import re
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from subprocess import CompletedProcess

from gcloud import advice, gcloud, run
from keys import Keys, fail, misuse, say

READY = ("ACTIVE", "READY")  # of a queued slice, of one that is not queued
RESULTS = ("wrong", "failed", "stopped", "none", "terminated", "running", "done")  # the most urgent one first


class Slice:
    def __init__(self, keys: Keys):
        self.keys = keys
        self.queued, self.several = keys.QUEUED == "yes", keys.SLICES != "1"
        self.resource = ["compute", "tpus", "queued-resources" if self.queued else "tpu-vm"]
        self.nodes = [f"{keys.NAME}-{i}" for i in range(int(keys.SLICES))] if self.several else [keys.NAME]
        self.folder = keys.BUCKET or keys.SHARED

    def tell(self, text: str) -> None:
        if not self.keys.dry_run:  # in which nothing has happened
            say(text)

    def state(self, expected: str = "ACTIVE") -> str:
        """ABSENT if there is no such slice; in a dry run the expected state."""
        answer = self._describe("state.state" if self.queued else "state")
        if answer.returncode and re.search("NOT_FOUND|not found", answer.stderr):
            return "ABSENT"
        return expected if self.keys.dry_run else _output(answer)

    def tell_why(self) -> None:
        """Says why the request failed, and what to do."""
        reason = self._describe("state.failedData.error.message").stdout.strip() if self.queued else ""
        if reason:
            say(f"{reason}\n{advice(self.keys, f'ERROR: (gcloud) {reason}')}".rstrip())

    def request(self) -> None:
        keys = self.keys
        alpha, flags = [], {"spot": ["--spot"], "reserved": ["--reserved"], "on-demand": []}[keys.KIND]
        if keys.AUTOCHECKPOINT == "yes":
            alpha, flags = ["alpha"], [*flags, "--autocheckpoint-enabled"]  # only alpha has this flag
        if self.several:
            flags += [f"--node-count={keys.SLICES}", f"--node-prefix={keys.NAME}"]
        elif self.queued:
            flags += [f"--node-id={keys.NAME}"]
        version = "runtime-version" if self.queued else "version"
        flags += [f"--accelerator-type={keys.TYPE}", f"--{version}={keys.VERSION}", *keys.CREATE_FLAGS.split()]
        self._do(*alpha, *self.resource, "create", keys.NAME, *flags)

    def setup(self) -> None:
        keys, folder = self.keys, f"simvlg_jax/{self.keys.REVISION}"
        copy = f"simvlg_jax-{keys.REVISION}.tar.gz"
        self.tell(f"revision {keys.REVISION} goes to all workers of {keys.NAME}")
        run(keys, "mkdir", "-p", "build")
        if run(keys, "git", "archive", "--format=tar.gz", f"--output=build/{copy}", keys.REVISION).returncode:
            fail(f"could not pack revision {keys.REVISION}")
        for node in self.nodes:
            self._do(*self._tpu_vm("scp", f"build/{copy}", f"{node}:{copy}", "--worker=all"))
        run(keys, "rm", "-f", f"build/{copy}")
        # When a connection breaks, gcloud repeats the whole command, even after its last step.
        unpack = f"mkdir -p {folder} && if test -e {copy}; then tar -xzf {copy} -C {folder}; fi"
        install = self._worker(keys.REVISION, "setup", "BUCKET", "SHARED")
        failure = "setup failed on at least one worker (see above); run it again, it goes on where it stopped"
        self._do_on_all(f"{unpack} && {install} && rm -f {copy}", failure)

    def check_shared(self) -> None:
        """All workers write each checkpoint together, into one folder."""
        if self.folder:
            return
        words = ["compute", "tpus", "tpu-vm", "describe", self.nodes[0], "--format=value(networkEndpoints.len())"]
        workers = _output(gcloud(self.keys, *words, quiet=True))
        if self.several or workers not in ("", "1"):
            folder = "BUCKET=gs://..., or SHARED=/a/folder/of/all"
            misuse(f"{self.keys.NAME} has several workers, which need one folder to save to: {folder}")
        self.tell("note: checkpoints lie on the slice's own disk and go with it; with BUCKET=gs://... they stay")

    def check_idle(self) -> None:
        self._do_on_all(self._if_set_up(self.keys.REVISION, "idle"), "not started")

    def start(self) -> None:
        keys, values = self.keys, ("BUCKET", "SHARED", "CONFIG", "WORKDIR", "ARGS", "MAX_RESTARTS", "PAUSE")
        failure = "not started on at least one worker (see above); end it on the others: bash launch/tpu.sh stop"
        self._do_on_all(self._if_set_up(keys.REVISION, "start", *values), failure)
        folder = f"{keys.WORKDIR} of {self.folder or 'its own disk'}"
        self.tell(f"{keys.NAME} trains {keys.CONFIG}, revision {keys.REVISION}, into {folder}")

    def result(self) -> tuple[str, str]:
        """One word for all workers, the most urgent one; with "unknown" also what gcloud has said."""
        command = f"if ! test -e simvlg_jax/current; then echo none; exit; fi; {self._worker('current', 'result')}"
        answers = self._on_all(command, quiet=True)
        errors = "".join(answer.stderr for answer in answers)
        if any(answer.returncode for answer in answers):
            # The state of a queued slice may not show yet that it was preempted.
            return ("preempted", "") if "terminal state" in errors else ("unknown", errors)
        words = "".join(answer.stdout for answer in answers).splitlines()
        return next(((word, "") for word in RESULTS if word in words), ("unknown", errors))

    def logs(self) -> None:
        if self.keys.FOLLOW == "yes":
            self.tell("worker 0's log; Ctrl-C leaves the run going, bash launch/tpu.sh stop ends it")
        try:
            answer = gcloud(self.keys, *self._ssh(self.nodes[0], "0", self._if_set_up("current", "log", "FOLLOW")))
        except KeyboardInterrupt:
            say("the run goes on; bash launch/tpu.sh logs shows it")
            raise
        if answer.returncode == 255:
            fail("the connection is gone, the run goes on; bash launch/tpu.sh logs shows it")
        sys.exit(answer.returncode != 0)

    def status(self) -> None:
        keys, state = self.keys, self.state()
        self.tell(f"{keys.NAME}: {state}")
        if state == "ABSENT":
            fail(f"there is no {keys.NAME} in {keys.ZONE} of {keys.PROJECT}; is NAME, ZONE or QUEUED another?")
        if state in READY:
            self._do_on_all(self._if_set_up("current", "status"), "no status of at least one worker (see above)")

    def stop(self) -> None:
        self._do_on_all(self._if_set_up("current", "stop"), "could not stop it on all workers (see above)")

    def delete(self) -> None:
        self._do(*self.resource, "delete", self.keys.NAME, *["--force"] * self.queued)  # with its nodes
        kept = f"{self.folder} is kept" if self.folder else "what lay on its own disk is gone"
        self.tell(f"{self.keys.NAME} is deleted; {kept}")

    def _describe(self, field: str) -> CompletedProcess:
        return gcloud(self.keys, *self.resource, "describe", self.keys.NAME, f"--format=value({field})", quiet=True)

    def _do(self, *words: str) -> None:
        if gcloud(self.keys, *words).returncode:
            sys.exit(1)  # gcloud has said why

    def _do_on_all(self, command: str, failure: str) -> None:
        if any(answer.returncode for answer in self._on_all(command)):
            fail(failure)

    def _on_all(self, command: str, quiet: bool = False) -> list[CompletedProcess]:
        """Runs a command on all workers of all slices at the same time."""
        with ThreadPoolExecutor(1 if self.keys.dry_run else len(self.nodes)) as pool:
            return list(pool.map(lambda n: gcloud(self.keys, *self._ssh(n, "all", command), quiet=quiet), self.nodes))

    def _ssh(self, node: str, worker: str, command: str) -> list[str]:
        return self._tpu_vm("ssh", node, f"--worker={worker}", f"--command={command}")

    def _tpu_vm(self, verb: str, *words: str) -> list[str]:
        flags = self.keys.SSH_FLAGS.split()
        alpha = ["alpha"] * ("--tunnel-through-iap" in flags)  # only alpha has this flag
        return [*alpha, "compute", "tpus", "tpu-vm", verb, *words, *flags]

    def _worker(self, revision: str, verb: str, *names: str) -> str:
        """The command line for launch/worker.sh, with the values of the named keys."""
        values = [f"{name}={getattr(self.keys, name)}" for name in (*names, "NAME")]
        return shlex.join(["bash", f"simvlg_jax/{revision}/launch/worker.sh", verb, *values])

    def _if_set_up(self, revision: str, verb: str, *names: str) -> str:
        missing = 'echo "error: not set up; first: bash launch/tpu.sh setup" >&2; exit 1'
        return f"test -e simvlg_jax/{revision} || {{ {missing}; }}; {self._worker(revision, verb, *names)}"


def _output(answer: CompletedProcess) -> str:
    if answer.returncode:
        say(answer.stderr.rstrip())
        sys.exit(1)
    return answer.stdout.strip()
