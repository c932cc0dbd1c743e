"""Runs gcloud, and says after a known error what to do about it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

from keys import Keys

# A pattern of gcloud's error, and what to do; the first one that matches counts.
ADVICE = {
    "capacity": "no capacity for {TYPE} in {ZONE} now: QUEUED=yes waits for it, or try another ZONE or KIND",
    "RESOURCE_EXHAUSTED|[Qq]uota": "no quota for {TYPE}, KIND={KIND}, in {ZONE}: try another ZONE or KIND, or ask for "
    "more at https://console.cloud.google.com/iam-admin/quotas?project={PROJECT} (Cloud TPU API)",
    "SSH Key is not present": "to reach several workers ssh's agent must hold your key: "
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


def run(keys: Keys, *command: str) -> int:
    """Runs any command, or prints it in a dry run. Returns the exit status."""
    if not keys.dry_run:
        return subprocess.run(command).returncode
    print(shlex.join(command), flush=True)
    return 0


def gcloud(keys: Keys, *words: str, quiet: bool = False) -> subprocess.CompletedProcess:
    """Shows gcloud's output and errors as they come, or nothing if `quiet`; then the answer holds the output."""
    command = ["gcloud", *words, f"--zone={keys.ZONE}", f"--project={keys.PROJECT}", "--quiet"]
    if keys.dry_run:
        return subprocess.CompletedProcess(command, run(keys, *command), "", "")
    process = subprocess.Popen(command, stdout=subprocess.PIPE if quiet else None, stderr=subprocess.PIPE)
    shown = b""
    while not quiet and (chunk := process.stderr.read1()):
        os.write(sys.stderr.fileno(), chunk)
        shown += chunk
    output, errors = process.communicate()
    errors = (shown + errors).decode(errors="replace")
    help_ = advice(keys, errors) if process.returncode else ""
    if not quiet:
        sys.stderr.write(help_)
    return subprocess.CompletedProcess(command, process.returncode, (output or b"").decode(), errors + help_)
