"""
Cloud TPU slices: makes one, installs this project on its workers, trains there and goes on after preemption.

  bash launch/tpu.sh create|setup|run|logs|status|stop|delete [KEY=VALUE ...] [--dry-run]

  create   requests a slice and waits for it           logs     shows worker 0's log
  setup    copies a git revision to every worker       status   shows the slice's state, and each worker's
           and installs what it needs                  stop     saves and ends the run on all workers
  run      starts training on all workers, detached    delete   deletes the slice; a bucket is kept

A slice is paid for until it is deleted. --dry-run prints the commands and runs none. ARGS and the FLAGS are split at
blanks, and quotes in them are literal. ARGS and CONFIG call the folder that all workers share shared/, as in
--config.data.path=shared/data.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from keys import Key, Keys, fail, misuse, say, show_usage
from slices import Slice
from watch import create, run

VERBS = ("create", "setup", "run", "logs", "status", "stop", "delete")
YES_NO, COUNT, SECONDS = "yes|no", "0|[1-9][0-9]*", r"[0-9]+(\.[0-9]+)?"
NAME, BUCKET = "[a-z]([-a-z0-9]{0,48}[a-z0-9])?", "(gs://[a-z0-9][-_.a-z0-9]+)?"
KEYS = {
    "NAME": Key("simvlg", "at most 50 lower-case letters, digits and dashes, a letter first", NAME),
    "ZONE": Key("", "ZONE=us-central1-a, or gcloud config set compute/zone us-central1-a"),
    "PROJECT": Key("", "PROJECT=ID, or gcloud config set project ID"),
    "TYPE": Key("", "the accelerator type: v5litepod-16, v6e-16, v5p-16, v4-32 and so on"),
    "VERSION": Key("", "the runtime version, chosen from TYPE if not given"),
    "KIND": Key("spot", "on-demand, reserved or spot", "on-demand|reserved|spot"),
    "QUEUED": Key("yes", "yes or no: whether to wait in a queue for capacity", YES_NO),
    "SLICES": Key("1", "a number, at least 1; several slices are trained on together", "[1-9][0-9]*"),
    "BUCKET": Key("", "gs://NAME, mounted on all workers; WORKDIR names a folder in it", BUCKET),
    "SHARED": Key("", "or the absolute path of a folder that all workers share anyway", "(/.*)?"),
    "REVISION": Key("", "the git revision that the workers get, HEAD if not given"),
    "CONFIG": Key("", "of simvlg_jax.train, for example CONFIG=configs/openmoji.py"),
    "WORKDIR": Key("", "a path in the shared folder, without ..; runs/NAME if not given", r"(?!/|(.*/)?\.\.(/|$)).*"),
    "ARGS": Key("", "more arguments of simvlg_jax.train"),
    "MAX_RESTARTS": Key("20", "a number: how often a worker starts training again", COUNT),
    "FOLLOW": Key("yes", "yes or no: whether to go on showing the log as it grows", YES_NO),
    "WATCH": Key("no", "yes or no: whether run stays, and makes a preempted slice again", YES_NO),
    "AUTOCHECKPOINT": Key("no", "yes or no: whether training saves before maintenance of the TPU", YES_NO),
    "CREATE_FLAGS": Key("", "more flags for gcloud's create"),
    "SSH_FLAGS": Key("", "more flags for gcloud's ssh and scp"),
    "POLL": Key("30", "a number of seconds, between looks at the slice", SECONDS),
    "PAUSE": Key("10", "a number of seconds, before a restart", SECONDS),
}
BASE = "tpu-ubuntu2204-base"
RUNTIMES = dict(v2=BASE, v3=BASE, v4=BASE, v5litepod="v2-alpha-tpuv5-lite", v5p="v2-alpha-tpuv5", v6e="v2-alpha-tpuv6e")


def check(verb: str, keys: Keys) -> None:
    keys.WORKDIR = keys.WORKDIR or f"runs/{keys.NAME}"
    if keys.BUCKET and keys.SHARED:
        misuse("BUCKET and SHARED exclude each other")
    if keys.SLICES != "1" and keys.QUEUED == "no":
        misuse("several slices are only made together in a queue: QUEUED=yes")
    watched = verb == "run" and keys.WATCH == "yes"
    if verb == "run" and not keys.CONFIG:
        misuse("CONFIG is missing, for example CONFIG=configs/openmoji.py")
    if watched and not keys.BUCKET + keys.SHARED:
        misuse("WATCH=yes needs BUCKET=gs://... (or SHARED): what was saved on a slice's own disk goes with the slice")
    if verb == "create" or (watched and keys.KIND == "spot"):  # which may have to be made again
        check_type(keys)
    if verb in ("setup", "run"):
        check_revision(keys, "launch/worker.sh", *[keys.CONFIG.partition(":")[0]] * (verb == "run"))
    check_gcloud(keys)


def check_type(keys: Keys) -> None:
    family, _, size = keys.TYPE.partition("-")
    if topology := re.fullmatch("(v[0-9]+[a-z]*):([1-9][0-9]*(x[1-9][0-9]*)+)", keys.TYPE):
        family, chips = topology[1], math.prod(map(int, topology[2].split("x")))
        size = chips if family in ("v5e", "v6e") else 2 * chips  # the others count TensorCores
        name = f"{'v5litepod' if family == 'v5e' else family}-{size}"
        keys.refuse("TYPE", f"it is an accelerator type, not a topology; for {keys.TYPE} say TYPE={name}")
    if family == "v5e":
        keys.refuse("TYPE", f"v5e slices are called v5litepod: TYPE=v5litepod-{size}")
    if not re.fullmatch("v[0-9]+[a-z]*-[0-9]+", keys.TYPE):
        keys.refuse("TYPE", KEYS["TYPE"].meaning)
    keys.VERSION = keys.VERSION or RUNTIMES.get(family, "")
    if not keys.VERSION:
        misuse(f"VERSION is missing: no runtime version is known here for {keys.TYPE}")


def check_revision(keys: Keys, *needed: str) -> None:
    """Makes REVISION a short hash. What is not committed cannot be copied, which the user must accept by naming one."""
    if output("git", "rev-parse", "--is-inside-work-tree") != "true":
        fail(f"{os.getcwd()} is not a git repository; workers get a revision of it (git clone, not a download)")
    asked, dirty = keys.REVISION, output("git", "status", "--porcelain", "--untracked-files=no")
    keys.REVISION = output("git", "rev-parse", "--verify", "--short=10", f"{asked or 'HEAD'}^{{commit}}")
    if not keys.REVISION:
        fail(f"git knows no revision '{asked or 'HEAD'}'")
    if dirty and not asked:
        fail("there are uncommitted changes, which workers would not get; commit them, or say REVISION=HEAD")
    if dirty:
        say(f"note: uncommitted changes are not part of revision {keys.REVISION}")
    for name in needed:
        if not output("git", "cat-file", "-t", f"{keys.REVISION}:{name}"):
            fail(f"revision {keys.REVISION} has no {name}; is it committed?")


def check_gcloud(keys: Keys) -> None:
    found = shutil.which("gcloud")
    if not found and not keys.dry_run:
        fail("no gcloud on the PATH; it is at https://cloud.google.com/sdk/docs/install")
    for name, setting in (("ZONE", "compute/zone"), ("PROJECT", "project")):
        value = getattr(keys, name) or (output("gcloud", "config", "get-value", setting) if found else "")
        setattr(keys, name, value or name * keys.dry_run)  # a dry run leaves it to be filled in
        if not getattr(keys, name):
            keys.refuse(name, KEYS[name].meaning)


def output(*command: str) -> str:
    """What a command prints; nothing if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() * (done.returncode == 0)


def main() -> None:
    show_usage(__doc__, KEYS, sys.argv[1:])
    verb, *arguments = sys.argv[1:]
    if verb not in VERBS:
        misuse(f"unknown verb '{verb}'; it is one of {', '.join(VERBS)}")
    keys = Keys(KEYS, arguments)
    check(verb, keys)
    action = {"create": create, "run": run}.get(verb) or getattr(Slice, verb)
    action(Slice(keys))


if __name__ == "__main__":
    os.chdir(Path(__file__).parent.parent)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
