#!/usr/bin/env bash
# Trains on one node with GPUs, or under Slurm on several; "bash launch/gpu.sh help" explains it.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "$0")/environment.sh"
python=$(find_python)
exec "$python" launch/gpu.py "$@"
