#!/usr/bin/env bash
# What launch/tpu.sh runs over ssh on each worker of a slice; there is no need to call it by hand.
#
#   bash launch/worker.sh setup|idle|start|loop|stop|status|result|log NAME=... [KEY=VALUE ...]
#
# On a worker everything lies in ~/simvlg_jax:
#   REVISION/          the code of one revision; current points to the last one used
#   .venv/             the environment, shared by the revisions
#   logs/NAME.log      what the training of NAME prints, and when it was started and ended
#   state/NAME.*       lock (held while a run goes on), process ids, the wish to stop, the result
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "$0")/environment.sh"
# shellcheck source=launch/bucket.sh
source launch/bucket.sh
NAME=simvlg BUCKET='' SHARED='' CONFIG='' WORKDIR='' ARGS='' MAX_RESTARTS=20 PAUSE=10 WAIT=300 FOLLOW=yes
for pair in "${@:2}"; do declare "$pair"; done

requirements=(requirements-tpu.txt requirements.txt) # the pinned versions first: of others none is fetched
home=$HOME/simvlg_jax
log=$home/logs/$NAME.log
state=$home/state/$NAME
mkdir -p "$home/logs" "$home/state"

# The lock is inherited by the training process: it is held as long as either lives, and gone after a reboot.
running() { ! flock --shared --nonblock "$state.lock" true; }
note() { say "$(date -u +%FT%TZ) $*"; }
# gcloud runs a command again when its connection broke: that one waits until the first is through. What outlives
# both is started without this lock (8>&-).
alone() { exec 8>"$home/state/setup.lock"; flock 8; }
signal() { kill -TERM "$(cat "$state.training" 2>/dev/null)" 2>/dev/null || true; }

setup() {
  alone
  ln -sfn "$PWD" "$home/current"
  mkdir -p "$home/.venv"
  ln -sfn ../.venv .venv
  find_modern_python
  need_environment "${requirements[@]}"
  link_shared
  say "$HOSTNAME: ready"
}

# The images of TPU VMs come with Python 3.10; uv brings a newer one without touching the system's.
find_modern_python() {
  if [ -x "$PYTHON" ]; then PYTHON_BASE=$PYTHON; return; fi
  if "$(find_python 2>/dev/null)" -c 'import ensurepip' 2>/dev/null; then return; fi
  say "$HOSTNAME: installing Python 3.12"
  { python3 -m pip install --quiet --user uv && python3 -m uv --quiet python install 3.12; } ||
    fail "$HOSTNAME: could not install Python 3.12 with uv; the worker needs a way to the internet"
  PYTHON_BASE=$(python3 -m uv python find 3.12)
}

# Names the folder that all workers share "shared", in the revision's folder, where training runs.
link_shared() {
  local folder=${SHARED:-$home/shared}
  if [ -n "$BUCKET" ]; then folder=$HOME/bucket; mount_bucket "${BUCKET#gs://}" "$folder"; fi
  mkdir -p "$folder" || fail "$HOSTNAME: cannot make the folder $folder"
  ln -sfn "$folder" shared
}

idle() {
  if running; then fail "$HOSTNAME: a run is going on here; end it with: bash launch/tpu.sh stop"; fi
}

start() {
  alone
  if running; then say "$HOSTNAME: goes on"; return; fi
  installed "${requirements[@]}" || fail "$HOSTNAME: not installed, or not wholly; first: bash launch/tpu.sh setup"
  ln -sfn "$PWD" "$home/current"
  link_shared
  rm -f "$state.stop" "$state.result"
  setsid nohup bash launch/worker.sh loop "$@" >>"$log" 2>&1 </dev/null 8>&- &
  for _ in $(seq 100); do
    if [ -e "$state.result" ] || running; then return; fi
    sleep 0.1
  done
  fail "$HOSTNAME: the run did not start in 10 s; see $log"
}

# Trains until it is done, stopped, restarted too often, or fails for a reason that stays (exit status 1: no weights, a
# full disk; 2: asked for wrongly). Whatever else ends training may not happen again: a crash, another worker's loss.
loop() {
  local status restarts=0 begun arguments terminated=''
  exec 9>"$state.lock"
  flock --timeout 5 9 || fail "$HOSTNAME: a run is going on here" # not at once: asking takes the lock for a moment
  printf '%s\n' $$ >"$state.loop"
  trap 'terminated=yes; signal' TERM # the machine is going down: the training process saves
  # JAX learns from the TPU VM's metadata which worker of which slice this is, also with several slices.
  export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu} # named, the TPU must work: no silent training on the CPU
  read -r -d '' -a arguments <<<"$ARGS" || true
  set -- "$PYTHON" -m simvlg_jax.train --distributed --config "$CONFIG" --workdir "shared/$WORKDIR" "${arguments[@]}"
  while [ ! -e "$state.stop" ]; do
    begun=$SECONDS status=0
    note "start $restarts: $*"
    train "$@" || status=$?
    note "exit status $status after $((SECONDS - begun)) s"
    case $status in 0) finish 'done' ;; 1) finish failed ;; 2) finish wrong ;; esac
    if [ -e "$state.stop" ]; then break; fi
    if [ -n "$terminated" ]; then finish terminated; fi
    if [ "$restarts" -ge "$MAX_RESTARTS" ]; then finish failed; fi
    restarts=$((restarts + 1))
    note "starting again in $PAUSE s, restart $restarts of $MAX_RESTARTS"
    sleep "$PAUSE"
  done
  finish stopped
}

train() {
  local status process
  "$@" &
  process=$!
  printf '%s\n' "$process" >"$state.training"
  if [ -e "$state.stop" ]; then signal; fi # asked for before there was a process to signal
  while :; do # a signal to this script ends its wait early
    status=0
    wait "$process" || status=$?
    kill -0 "$process" 2>/dev/null || break
  done
  rm -f "$state.training"
  return "$status"
}

finish() {
  note "the run ends: $1"
  printf '%s\n' "$1" >"$state.result"
  exit
}

stop() {
  touch "$state.stop"
  if ! running; then say "$HOSTNAME: no run is going on"; return; fi
  signal
  # flock waits for what holds the lock, so this returns as soon as the training process has saved and gone.
  if flock --shared --timeout "$WAIT" "$state.lock" true; then say "$HOSTNAME: stopped"; return; fi
  # It waits for another worker that is no more. What was saved last is whole.
  kill -KILL "$(cat "$state.training")" 2>/dev/null || true
  say "$HOSTNAME: had not stopped after $WAIT s and was killed"
}

result() {
  if running; then echo running; else cat "$state.result" 2>/dev/null || echo none; fi
}

status() {
  local word line
  word=$(result)
  line=$(tail -n 1 "$log" 2>/dev/null | cut -c 1-300 || true)
  printf '%s: %s | %s\n' "$HOSTNAME" "${word/none/not running}" "${line:-no log yet}"
}

show_log() {
  local word follow=()
  [ -e "$log" ] || fail "$HOSTNAME: no log yet"
  if [ "$FOLLOW" = yes ] && running; then follow=(-F --pid "$(cat "$state.loop")"); fi
  tail -n 20 "${follow[@]}" "$log" 2>/dev/null
  word=$(result)
  say "$HOSTNAME: ${word/none/not running}"
  case $word in running | 'done') ;; *) [ "$FOLLOW" = no ] || exit 1 ;; esac
}

case ${1:-} in
  setup | idle | stop | result | status) "$1" ;;
  start | loop) "$1" "${@:2}" ;;
  log) show_log ;;
  *) fail "unknown verb '${1:-}'" ;;
esac
