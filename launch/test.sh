#!/usr/bin/env bash
# Makes the environment and runs the whole test suite; arguments go to pytest.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "$0")/environment.sh"
need_environment requirements.txt requirements-example.txt requirements-test.txt
exec "$PYTHON" -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
