#!/usr/bin/env bash
# Makes Cloud TPU slices and trains on them; "bash launch/tpu.sh help" explains it.
set -euo pipefail
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null; then
  echo "error: Python 3.8 or newer is needed, as python3 on the PATH" >&2
  exit 1
fi
exec python3 "$(dirname "$0")/tpu.py" "$@"
