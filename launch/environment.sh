# shellcheck shell=bash
# Sourced by the other scripts: enters the repository's root, and defines PYTHON, say, fail and these functions.
# find_python: prints a Python that is new enough.
# installed FILE...: whether .venv holds what these requirement files name.
# need_environment FILE...: makes .venv hold it, offline if it already does. "bash launch/environment.sh FILE..." too.

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
PYTHON=.venv/bin/python

find_python() {
  local candidate
  for candidate in ${PYTHON_BASE:-} python3.13 python3.12 python3.11 python3 "$PYTHON"; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  fail "Python 3.11 or newer is needed; install it, or name one: PYTHON_BASE=/path/to/python3.12"
}

installed() { [ -x "$PYTHON" ] && [ "$(cat .venv/installed 2>/dev/null)" = "$(cat "$@")" ]; }

need_environment() {
  local base free file options started=$SECONDS
  if installed "$@"; then return; fi
  base=$(find_python) || exit 1
  free=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
  [ "$free" -ge 4 ] || fail "4 GB of free disk are needed for .venv and data, $free GB are free here"
  if [ ! -x "$PYTHON" ]; then
    say "making .venv with $("$base" --version)"
    "$base" -m venv .venv || { rm -rf .venv; fail "python -m venv failed (on Debian: apt install python3-venv)"; }
  fi
  "$PYTHON" -m pip --version >/dev/null 2>&1 || fail "no pip in .venv; remove .venv and run again"
  for file in "$@"; do
    say "installing $file"
    options=(--quiet --disable-pip-version-check)
    if [ "$file" = requirements-example.txt ]; then options+=(--no-deps); fi
    "$PYTHON" -m pip install "${options[@]}" -r "$file" ||
      fail "pip could not install $file; with a network connection, run again"
  done
  cat "$@" >.venv/installed
  say "installed in $((SECONDS - started)) s"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then need_environment "$@"; fi
