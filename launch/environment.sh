# shellcheck shell=bash
# Sourced by the other scripts: checks the machine, makes .venv once, and defines PYTHON and say.
# installed FILE...: whether .venv holds what these requirement files name.
# need_environment FILE...: installs these requirement files, unless .venv already holds them (so it runs offline).
# read_keys "KEY..." ARGUMENT...: sets the KEY=VALUE arguments as variables, and DRY_RUN.

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }
misuse() { say "error: $*"; exit 2; }

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
PYTHON=.venv/bin/python

find_python() {
  local candidate
  for candidate in ${PYTHON_BASE:-} python3.13 python3.12 python3.11 python3; do
    if command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

installed() { [ -x "$PYTHON" ] && [ "$(cat .venv/installed 2>/dev/null)" = "$(cat "$@")" ]; }

need_environment() {
  local wanted base free
  if installed "$@"; then return; fi
  wanted=$(cat "$@")
  base=$(find_python) || fail "Python 3.11 or newer is needed; install it, or name one: PYTHON_BASE=/path/to/python3.12"
  free=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
  [ "$free" -ge 4 ] || fail "4 GB of free disk are needed for .venv and data, $free GB are free here"
  if [ ! -x "$PYTHON" ]; then
    say "making .venv with $("$base" --version)"
    "$base" -m venv .venv || { rm -rf .venv; fail "python -m venv failed (on Debian: apt install python3-venv)"; }
  fi
  "$PYTHON" -m pip --version >/dev/null 2>&1 || fail "no pip in .venv; remove .venv and run again"
  local file started=$SECONDS
  for file in "$@"; do
    say "installing $file"
    if [ "$file" = requirements-example.txt ]; then set -- --no-deps; else set --; fi
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@" -r "$file" ||
      fail "pip could not install $file; with a network connection, run again"
  done
  printf '%s\n' "$wanted" >.venv/installed
  say "installed in $((SECONDS - started)) s"
}

given=' ' # the keys that came as arguments
read_keys() {
  local known=" $1 " argument key
  shift
  for argument in "$@"; do
    key=${argument%%=*}
    if [ "$argument" = --dry-run ]; then DRY_RUN=yes; continue; fi
    case $argument in *=*) ;; *) misuse "'$argument' is no KEY=VALUE" ;; esac
    if [[ ! $key =~ ^[A-Z_]+$ || $known != *" $key "* ]]; then misuse "unknown key '$key'; known are:${known% }"; fi
    printf -v "$key" %s "${argument#*=}"
    given+="$key "
  done
}

# KEY MESSAGE: its value is wrong. Other programs set such names too: NAME is the host's on WSL.
wrong() {
  case $given in *" $1 "*) misuse "$2" ;; *) misuse "$2 (from the environment)" ;; esac
}

number() { [[ $2 =~ ^(0|[1-9][0-9]*)$ ]] || wrong "$1" "$1 is a number, not '$2'"; }

# Words as a shell reads them again. Single quotes, not printf's %q, so that a dry run stays readable.
quote() {
  local word separator='' escaped="'\\''"
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) printf "%s'%s'" "$separator" "${word//\'/$escaped}" ;;
      *) printf '%s%s' "$separator" "$word" ;;
    esac
    separator=' '
  done
}

# In a dry run prints the command (on 3, which scripts open as their output: 1 may be being collected) and is true.
dry() {
  [ "${DRY_RUN:-no}" = yes ] || return 1
  printf '%s\n' "$(quote "$@")" >&3
}
