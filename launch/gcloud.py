"""Runs gcloud, and says after a known error what to do about it."""

from __future__ import annotations

import os
import re
import shlex
import sys
from subprocess import PIPE, CompletedProcess, Popen

from keys import Keys, fail

# A pattern of gcloud's error, and what to do; the first one that matches counts.
ADVICE = {
    "capacity": "no capacity for {TYPE} in {ZONE} now: QUEUED=yes waits for it, or try another ZONE or KIND",
    "RESOURCE_EXHAUSTED|[Qq]uota": "no quota for {TYPE}, KIND={KIND}, in {ZONE}: try another ZONE or KIND, or ask for "
    "more at https://console.cloud.google.com/iam-admin/quotas?project={PROJECT} (Cloud TPU API)",
    "SSH Key is not present": "ssh's agent must hold your key to reach several workers: "
    "ssh-add ~/.ssh/google_compute_engine",
    "gcloud auth login|UNAUTHENTICATED": "gcloud is not logged in: gcloud auth login",
    "PERMISSION_DENIED": "not allowed in project {PROJECT}: you need the role roles/tpu.admin, and the project the "
    "API: gcloud services enable tpu.googleapis.com --project={PROJECT}",
    r"\.create\).*(NOT_FOUND|not found)": "{ZONE} has no {TYPE} or no version {VERSION}; what it has: "
    "gcloud compute tpus accelerator-types list --zone={ZONE}",
    "NOT_FOUND|not found": "there is no {NAME} in {ZONE} of {PROJECT}: are NAME, ZONE and QUEUED right? "
    "bash launch/tpu.sh create makes it",
}


def advice(keys: Keys, errors: str) -> str:
    error = re.search(r"ERROR: *\(gcloud.*", errors, re.DOTALL)  # what a worker itself says comes before
    for pattern, text in ADVICE.items() if error else ():
        if re.search(pattern, error[0], re.DOTALL):
            return f"error: {text.format(**vars(keys))}\n"
    return ""


def gcloud(keys: Keys, *words: str, quiet: bool = False) -> CompletedProcess:
    return run(keys, "gcloud", *words, f"--zone={keys.ZONE}", f"--project={keys.PROJECT}", "--quiet", quiet=quiet)


def run(keys: Keys, *command: str, quiet: bool = False) -> CompletedProcess:
    """Shows output and errors as they come, or if `quiet` nothing. A dry run only prints the command."""
    if keys.dry_run:
        print(shlex.join(command), flush=True)
        return CompletedProcess(command, 0, "", "")
    try:
        process = Popen(command, stdout=PIPE if quiet else None, stderr=PIPE)
    except OSError as error:
        fail(f"cannot run {command[0]}: {error}")
    shown = b""
    while not quiet and (chunk := process.stderr.read1()):
        os.write(sys.stderr.fileno(), chunk)
        shown += chunk
    output, errors = process.communicate()
    errors = (shown + errors).decode(errors="replace")
    hint = advice(keys, errors) if process.returncode else ""
    if not quiet:
        sys.stderr.write(hint)
    return CompletedProcess(command, process.returncode, (output or b"").decode(), errors + hint)
