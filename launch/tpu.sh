#!/usr/bin/env bash
# Cloud TPU slices: makes one, installs this project on its workers, trains there and goes on after preemption.
#
#   bash launch/tpu.sh create|setup|run|logs|status|stop|delete [KEY=VALUE ...] [--dry-run]
#
#   create   requests a slice and waits for it           logs     shows worker 0's log (FOLLOW=no: its end)
#   setup    copies a git revision to every worker       status   the slice's state, and each worker's
#            and installs what it needs                  stop     saves and ends the run on all workers
#   run      starts training on all workers, detached    delete   deletes the slice; a bucket is kept
#
# Keys, each also read from the environment [default]:
#   NAME [simvlg]  ZONE PROJECT [of gcloud config]       the slice
#   TYPE           v5litepod-16, v6e-16, v5p-16, v4-32   VERSION [by TYPE]      KIND on-demand|reserved|spot [spot]
#   QUEUED [yes]   waits in a queue for capacity         SLICES [1]             slices trained on together
#   BUCKET         gs://NAME, mounted on all workers     SHARED                 or a folder that all share anyway
#   REVISION [HEAD]                                      CONFIG WORKDIR [runs/NAME] ARGS    of simvlg_jax.train
#   MAX_RESTARTS [20]  FOLLOW [yes]                      WATCH [no]: run stays, and makes a preempted slice anew
#   AUTOCHECKPOINT [no]    before maintenance of the TPU, training is told to save (made with gcloud alpha)
#   CREATE_FLAGS SSH_FLAGS more flags for gcloud's create, and for its ssh and scp
#   POLL [30] PAUSE [10]   seconds between looks at the slice, and before a restart
# WORKDIR lies in the shared folder; in ARGS and CONFIG call that folder shared/, as in --config.data.path=shared/data.
# ARGS and the FLAGS are split at blanks; quotes in them are literal. A slice is paid for until it is deleted.
# --dry-run prints the commands and runs none.
set -euo pipefail
NAME=${NAME:-simvlg} ZONE=${ZONE:-} PROJECT=${PROJECT:-} TYPE=${TYPE:-} VERSION=${VERSION:-} KIND=${KIND:-spot}
QUEUED=${QUEUED:-yes} SLICES=${SLICES:-1} BUCKET=${BUCKET:-} SHARED=${SHARED:-} REVISION=${REVISION:-}
CONFIG=${CONFIG:-} WORKDIR=${WORKDIR:-} ARGS=${ARGS:-} MAX_RESTARTS=${MAX_RESTARTS:-20} FOLLOW=${FOLLOW:-yes}
WATCH=${WATCH:-no} POLL=${POLL:-30} PAUSE=${PAUSE:-10} AUTOCHECKPOINT=${AUTOCHECKPOINT:-no}
CREATE_FLAGS=${CREATE_FLAGS:-} SSH_FLAGS=${SSH_FLAGS:-} DRY_RUN=no
usage=$(sed -n '2,26s/^# \{0,1\}//p' "$0")
# shellcheck source=launch/environment.sh
source "$(dirname "$0")/environment.sh"
exec 3>&1
tell() { [ "$DRY_RUN" = yes ] || say "$@"; } # what has happened has not in a dry run
verb=${1:-}
case $verb in
  create | setup | run | logs | status | stop | delete) shift ;;
  help | -h | --help) echo "$usage"; exit ;;
  '') say "$usage"; exit 2 ;;
  *) misuse "unknown verb '$verb'; it is one of create, setup, run, logs, status, stop, delete" ;;
esac
read_keys "NAME ZONE PROJECT TYPE VERSION KIND QUEUED SLICES BUCKET SHARED REVISION CONFIG WORKDIR ARGS MAX_RESTARTS \
FOLLOW WATCH POLL PAUSE AUTOCHECKPOINT CREATE_FLAGS SSH_FLAGS" "$@"
WORKDIR=${WORKDIR:-runs/$NAME}
read -r -d '' -a create_flags <<<"$CREATE_FLAGS" || true
read -r -d '' -a ssh_flags <<<"$SSH_FLAGS" || true

# ---- what was asked for ----

one_of() { # KEY VALUE ALLOWED...
  local key=$1 value=$2 allowed
  shift 2
  for allowed in "$@"; do if [ "$value" = "$allowed" ]; then return; fi; done
  wrong "$key" "$key is $(printf '%s, ' "$@" | sed 's/, $//; s/, \([^,]*\)$/ or \1/'), not '$value'"
}

seconds() { [[ $2 =~ ^[0-9]+(\.[0-9]+)?$ ]] || wrong "$1" "$1 is a number of seconds, not '$2'"; }

check_keys() {
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,48}[a-z0-9])?$ ]] ||
    wrong NAME "NAME is lower-case letters, digits and dashes (at most 50, a letter first), not '$NAME'"
  one_of KIND "$KIND" on-demand reserved spot
  one_of QUEUED "$QUEUED" yes no
  one_of FOLLOW "$FOLLOW" yes no
  one_of WATCH "$WATCH" yes no
  one_of AUTOCHECKPOINT "$AUTOCHECKPOINT" yes no
  number SLICES "$SLICES"
  number MAX_RESTARTS "$MAX_RESTARTS"
  seconds POLL "$POLL"
  seconds PAUSE "$PAUSE"
  [ "$SLICES" -ge 1 ] || wrong SLICES "SLICES is at least 1"
  [ "$SLICES" = 1 ] || [ "$QUEUED" = yes ] || misuse "several slices are only made together in a queue: QUEUED=yes"
  [ -z "$BUCKET" ] || [[ $BUCKET =~ ^gs://[a-z0-9][-_.a-z0-9]+$ ]] ||
    wrong BUCKET "BUCKET is gs://NAME, not '$BUCKET'; folders in it belong to WORKDIR"
  [ -z "$BUCKET" ] || [ -z "$SHARED" ] || misuse "BUCKET and SHARED exclude each other"
  case $SHARED in '' | /*) ;; *) wrong SHARED "SHARED is a folder's absolute path on the workers, not '$SHARED'" ;; esac
  case /$WORKDIR/ in
    //* | */../*) wrong WORKDIR "WORKDIR lies in the shared folder: a relative path, not '$WORKDIR'" ;;
  esac
}

check_type() {
  [ -n "$TYPE" ] || misuse "TYPE is missing: the accelerator type, for example TYPE=v5litepod-16"
  if [[ $TYPE =~ ^v[0-9]+[a-z]*:[1-9][0-9]*(x[1-9][0-9]*)+$ ]]; then
    wrong TYPE "TYPE is an accelerator type, not a topology: for $TYPE say TYPE=$(type_of "$TYPE")"
  fi
  [[ $TYPE =~ ^v[0-9]+[a-z]*-[0-9]+$ ]] ||
    wrong TYPE "TYPE is like v5litepod-16, v6e-16, v5p-16 or v4-32, not '$TYPE'"
  case $TYPE in v5e-*) wrong TYPE "v5e slices are called v5litepod: TYPE=v5litepod-${TYPE#v5e-}" ;; esac
  if [ -n "$VERSION" ]; then return; fi
  case $TYPE in
    v5litepod-*) VERSION=v2-alpha-tpuv5-lite ;;
    v5p-*) VERSION=v2-alpha-tpuv5 ;;
    v6e-*) VERSION=v2-alpha-tpuv6e ;;
    v[234]-*) VERSION=tpu-ubuntu2204-base ;;
    *) misuse "VERSION is missing: no runtime version is known here for $TYPE" ;;
  esac
}

# A topology as the accelerator type it is sold as: v5e and v6e count chips, the others TensorCores, two on a chip.
type_of() {
  local version=${1%%:*} chips=${1#*:}
  chips=$((${chips//x/*}))
  case $version in
    v5e) echo "v5litepod-$chips" ;;
    v6e) echo "v6e-$chips" ;;
    *) echo "$version-$((2 * chips))" ;;
  esac
}

check_gcloud() {
  if command -v gcloud >/dev/null; then
    [ -n "$ZONE" ] || ZONE=$(gcloud config get-value compute/zone 2>/dev/null || true)
    [ -n "$PROJECT" ] || PROJECT=$(gcloud config get-value project 2>/dev/null || true)
  elif [ "$DRY_RUN" = no ]; then
    fail "no gcloud on the PATH; it is at https://cloud.google.com/sdk/docs/install"
  fi
  if [ "$DRY_RUN" = yes ]; then ZONE=${ZONE:-ZONE} PROJECT=${PROJECT:-PROJECT}; fi # to be filled in
  [ -n "$ZONE" ] || misuse "ZONE is missing: ZONE=us-central1-a, or gcloud config set compute/zone us-central1-a"
  [ -n "$PROJECT" ] || misuse "PROJECT is missing: PROJECT=ID, or gcloud config set project ID"
}

# Makes REVISION a short hash. What is not committed cannot be copied: that is an error unless asked for by name.
check_revision() {
  local hash asked=$REVISION
  git rev-parse --is-inside-work-tree >/dev/null 2>&1 ||
    fail "$PWD is not a git repository; workers get a revision of it (git clone, not a download)"
  hash=$(git rev-parse --verify --quiet "${asked:-HEAD}^{commit}") || fail "git knows no revision '${asked:-HEAD}'"
  REVISION=$(git rev-parse --short=10 "$hash")
  if [ -n "$(git status --porcelain --untracked-files=no)" ]; then
    [ -n "$asked" ] ||
      fail "there are uncommitted changes, which workers would not get; commit them, or say REVISION=HEAD"
    say "note: uncommitted changes are not part of revision $REVISION"
  fi
  git cat-file -e "$hash:launch/worker.sh" 2>/dev/null ||
    fail "revision $REVISION has no launch/worker.sh; take a newer one"
}

check_run() {
  [ -n "$CONFIG" ] || misuse "CONFIG is missing, for example CONFIG=configs/openmoji.py"
  git cat-file -e "$REVISION:${CONFIG%%:*}" 2>/dev/null ||
    fail "revision $REVISION has no ${CONFIG%%:*}; is it committed?"
  if [ "$WATCH" = yes ]; then
    [ -n "$BUCKET$SHARED" ] ||
      misuse "WATCH=yes needs BUCKET=gs://... (or SHARED): a slice's own disk, with what was saved there, goes with it"
    if [ "$KIND" = spot ]; then check_type; fi # it may have to be made again
  fi
}

# ---- gcloud ----

# gcloud with its errors shown as they come, and after a known one a line on what to do.
call() {
  local errors status=0
  set -- "$@" "--zone=$ZONE" "--project=$PROJECT" --quiet
  if dry gcloud "$@"; then return; fi
  errors=$(mktemp)
  { gcloud "$@" 2>&1 1>&4 | tee "$errors" >&2; } 4>&1 || status=$?
  if [ "$status" != 0 ]; then advise <"$errors"; fi
  rm -f "$errors"
  return "$status"
}

advise() {
  local errors what=${TYPE:-this type}
  errors=$(sed -n '/ERROR: *(gcloud/,$p') # a worker's own words come before
  case $errors in
    *capacity*)
      say "error: no capacity for $what in $ZONE now: QUEUED=yes waits for it, or try another ZONE or KIND" ;;
    *RESOURCE_EXHAUSTED* | *[Qq]uota*)
      say "error: no quota for $what, KIND=$KIND, in $ZONE: try another ZONE or KIND, or ask for more at" \
        "https://console.cloud.google.com/iam-admin/quotas?project=$PROJECT (Cloud TPU API)" ;;
    *'SSH Key is not present'*)
      say "error: to reach several workers ssh's agent must hold your key: ssh-add ~/.ssh/google_compute_engine" ;;
    *'gcloud auth login'* | *UNAUTHENTICATED*) say "error: gcloud is not logged in: gcloud auth login" ;;
    *PERMISSION_DENIED*)
      say "error: not allowed in project $PROJECT: you need the role roles/tpu.admin, and the project the API:" \
        "gcloud services enable tpu.googleapis.com --project=$PROJECT" ;;
    *NOT_FOUND* | *'not found'*)
      if [ "$verb" = create ]; then
        say "error: $ZONE has no $TYPE or no version $VERSION; what it has:" \
          "gcloud compute tpus accelerator-types list --zone=$ZONE"
      else
        say "error: there is no $NAME in $ZONE of $PROJECT: are NAME, ZONE and QUEUED right?" \
          "bash launch/tpu.sh create makes it"
      fi ;;
  esac
}

resource() { if [ "$QUEUED" = yes ]; then echo queued-resources; else echo tpu-vm; fi; }

# A slice's node is called as the queued resource, nodes of several slices NAME-0, NAME-1, ...
nodes() {
  local i
  if [ "$SLICES" = 1 ]; then echo "$NAME"; return; fi
  for ((i = 0; i < SLICES; i++)); do echo "$NAME-$i"; done
}

first_node() { nodes | sed -n 1p; }

# ACTIVE (queued), READY (not queued) and so on; ABSENT when there is none. In a dry run what must come next.
expected=ABSENT
state_of() {
  local format='value(state)' errors state status=0
  if [ "$QUEUED" = yes ]; then format='value(state.state)'; fi
  set -- compute tpus "$(resource)" describe "$NAME" "--format=$format"
  if [ "$DRY_RUN" = yes ]; then call "$@"; echo "$expected"; return; fi
  errors=$(mktemp)
  state=$(call "$@" 2>"$errors") || status=$?
  if [ "$status" != 0 ]; then
    if grep -qi 'not.found' "$errors"; then state=ABSENT status=0; else cat "$errors" >&2; fi
  fi
  rm -f "$errors"
  echo "$state"
  return "$status"
}

on_workers() { # NODE WORKERS COMMAND
  tpu_vm ssh "$1" "--worker=$2" "--command=$3"
}

tpu_vm() { # ssh or scp, with SSH_FLAGS
  local alpha=()
  case " $SSH_FLAGS " in *' --tunnel-through-iap '*) alpha=(alpha) ;; esac # which alone has it
  call ${alpha[@]+"${alpha[@]}"} compute tpus tpu-vm "$@" ${ssh_flags[@]+"${ssh_flags[@]}"}
}

# The same on all workers of all slices, at the same time.
on_all() {
  local node pid status=0 pids=()
  if [ "$SLICES" = 1 ] || [ "$DRY_RUN" = yes ]; then
    for node in $(nodes); do on_workers "$node" all "$1" || return; done
    return
  fi
  for node in $(nodes); do
    on_workers "$node" all "$1" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
  return "$status"
}

# FOLDER VERB [KEY=VALUE ...]: the command line for launch/worker.sh on a worker
worker() { printf 'bash simvlg_jax/%s/launch/worker.sh %s' "$1" "$(quote "${@:2}" "NAME=$NAME")"; }
worker_if_set_up() {
  printf 'test -e simvlg_jax/%s || { echo "error: not set up; first: bash launch/tpu.sh setup" >&2; exit 1; }; ' "$1"
  worker "$@"
}

# ---- verbs ----

request() {
  local flags=() track=()
  case $KIND in spot) flags=(--spot) ;; reserved) flags=(--reserved) ;; esac
  if [ "$AUTOCHECKPOINT" = yes ]; then track=(alpha) flags+=(--autocheckpoint-enabled); fi # which alone has it
  if [ "$QUEUED" = no ]; then
    flags+=("--accelerator-type=$TYPE" "--version=$VERSION")
    expected=READY
  else
    case $SLICES in 1) flags+=("--node-id=$NAME") ;; *) flags+=("--node-count=$SLICES" "--node-prefix=$NAME") ;; esac
    flags+=("--accelerator-type=$TYPE" "--runtime-version=$VERSION")
    expected=ACTIVE
  fi
  flags+=(${create_flags[@]+"${create_flags[@]}"})
  call ${track[@]+"${track[@]}"} compute tpus "$(resource)" create "$NAME" "${flags[@]}" || exit 1
}

why_failed() {
  local format='value(state.failedData.error.message)' reason
  if [ "$QUEUED" = no ]; then return; fi
  reason=$(call compute tpus queued-resources describe "$NAME" "--format=$format" 2>/dev/null) || return 0
  if [ -n "$reason" ]; then say "$reason"; advise <<<"ERROR: (gcloud) $reason"; fi
}

wait_until_ready() {
  local state before=''
  while :; do
    state=$(state_of) || exit 1
    if [ "$state" != "$before" ]; then tell "$(date +%T) $NAME: $state"; fi
    before=$state
    case $state in
      ACTIVE | READY) return ;;
      FAILED | SUSPENDING | SUSPENDED | PREEMPTED | TERMINATED | STOPPED | ABSENT)
        why_failed
        gone "$state" ;;
    esac
    sleep "$POLL"
  done
}

gone() {
  case $1 in
    FAILED) fail "$NAME is FAILED: the request could not be met. Delete it and ask again: bash launch/tpu.sh delete" ;;
    ABSENT) fail "$NAME is not there any more" ;;
    *) fail "$NAME is $1: it was preempted or stopped and does not come back. Delete it and create it again" ;;
  esac
}

create() {
  local state
  state=$(state_of) || exit 1
  if [ "$state" = ABSENT ]; then request; else say "$NAME exists already"; fi
  wait_until_ready
}

setup() {
  local archive=build/simvlg_jax-$REVISION.tar.gz copy=simvlg_jax-$REVISION.tar.gz folder=simvlg_jax/$REVISION node
  tell "revision $REVISION goes to all workers of $NAME"
  dry mkdir -p build || mkdir -p build
  dry git archive --format=tar.gz "--output=$archive" "$REVISION" ||
    git archive --format=tar.gz "--output=$archive" "$REVISION" || fail "could not pack revision $REVISION"
  for node in $(nodes); do
    tpu_vm scp "$archive" "$node:$copy" --worker=all || exit 1
  done
  dry rm -f "$archive" || rm -f "$archive"
  # gcloud runs this again from the start when a connection breaks, be it after the last step.
  on_all "mkdir -p $folder && if test -e $copy; then tar -xzf $copy -C $folder; fi && $(
    worker "$REVISION" setup "BUCKET=$BUCKET" "SHARED=$SHARED"
  ) && rm -f $copy" ||
    fail "setup failed on at least one worker (see above); run it again, it goes on where it stopped"
}

# Checkpoints are written by all workers into one folder.
check_shared() {
  local workers
  if [ -n "$BUCKET$SHARED" ]; then return; fi
  workers=$(call compute tpus tpu-vm describe "$(first_node)" '--format=value(networkEndpoints.len())') || exit 1
  if [ "$DRY_RUN" = yes ] && [ "$SLICES" = 1 ]; then return; fi
  if [ "${workers:-1}" != 1 ] || [ "$SLICES" != 1 ]; then
    misuse "$NAME has several workers, which need one folder to save to: BUCKET=gs://..., or SHARED=/a/folder/of/all"
  fi
  say "note: checkpoints lie on the slice's own disk and go with it; with BUCKET=gs://... they stay"
}

start() {
  local keys=("CONFIG=$CONFIG" "WORKDIR=$WORKDIR" "ARGS=$ARGS" "MAX_RESTARTS=$MAX_RESTARTS" "PAUSE=$PAUSE")
  on_all "$(worker_if_set_up "$REVISION" start "BUCKET=$BUCKET" "SHARED=$SHARED" "${keys[@]}")" ||
    fail "not started on at least one worker (see above); end it on the others: bash launch/tpu.sh stop"
  tell "$NAME trains $CONFIG, revision $REVISION, into $WORKDIR of ${BUCKET:-${SHARED:-its own disk}}"
}

run() {
  check_shared
  on_all "$(worker_if_set_up "$REVISION" idle)" || fail "not started"
  start
  if [ "$WATCH" = yes ]; then watch; elif [ "$FOLLOW" = yes ]; then logs; fi
}

logs() {
  local status=0
  if [ "$FOLLOW" = yes ]; then
    tell "worker 0's log; Ctrl-C leaves the run going, bash launch/tpu.sh stop ends it"
    trap 'say "the run goes on; bash launch/tpu.sh logs shows it"; exit 130' INT
  fi
  on_workers "$(first_node)" 0 "$(worker_if_set_up current log "FOLLOW=$FOLLOW")" || status=$?
  if [ "$status" = 255 ]; then fail "the connection is gone, the run goes on; bash launch/tpu.sh logs shows it"; fi
  if [ "$status" != 0 ]; then exit 1; fi
}

# Stays until the run ends, and brings the slice step by step back to where it trains: a spot slice that was preempted
# is deleted, what is not there is asked for, what is new or was rebooted is set up and started. The run goes on from
# what it has saved. Each step in a subshell: what fails now may work at the next look.
watch() {
  local state said result before='' deleted='' failures=0 i
  tell "watching every $POLL s; Ctrl-C leaves the run going, without a watch"
  expected=ACTIVE
  while [ "$failures" -lt 10 ]; do
    state=$(state_of) || state=UNKNOWN
    said=unknown
    case $state in ACTIVE | READY) said=$(result_of) ;; esac
    result=${said%%$'\n'*}
    if [ "$result" = preempted ]; then state=PREEMPTED; fi
    if [ "$state $result" != "$before" ]; then tell "$(date +%T) $NAME: $state, the run: $said"; fi
    before="$state $result"
    if [ "$DRY_RUN" = yes ]; then
      if [ "$KIND" = spot ]; then delete; request; fi
      setup; start; return
    fi
    case $state/$result in
      */done) return ;;
      */wrong | */failed | */stopped)
        fail "the run ended: $result; why: bash launch/tpu.sh logs FOLLOW=no, and what still goes on: status, stop" ;;
      */running) failures=0 ;;
      */none | */terminated) (setup && start) || failures=$((failures + 1)) ;;
      SUSPENDED/* | PREEMPTED/* | TERMINATED/*)
        if [ "$KIND" != spot ]; then gone "$state"; fi
        if (delete); then deleted=yes; else failures=$((failures + 1)); fi ;;
      FAILED/*)
        why_failed
        if [ "$KIND" != spot ]; then gone "$state"; fi
        if (delete); then deleted=yes; fi
        failures=$((failures + 1)) ;;
      ABSENT/*)
        [ -n "$deleted" ] || gone "$state" # somebody else has deleted it: not to be paid for again
        if (request); then deleted=''; else failures=$((failures + 1)); fi ;;
      STOPPED/*) gone "$state" ;;
      */unknown) case $state in ACTIVE | READY | UNKNOWN) failures=$((failures + 1)) ;; esac ;;
    esac
    for ((i = 0; i <= failures; i++)); do sleep "$POLL"; done # ever longer: an outage of some minutes passes
  done
  fail "gave up after $failures failures in a row (see above)"
}

# One word for all workers of all slices: the one that most needs something done. After "unknown", what gcloud said.
result_of() {
  local command errors words word=unknown
  command="if ! test -e simvlg_jax/current; then echo none; exit; fi; $(worker current result)"
  errors=$(mktemp)
  if words=$(on_all "$command" 2>"$errors"); then
    for word in wrong failed stopped none terminated running 'done' unknown; do
      if grep -qx "$word" <<<"$words"; then break; fi
    done
  elif grep -q 'terminal state' "$errors"; then
    word=preempted # and its request does not show it yet
  fi
  echo "$word"
  if [ "$word" = unknown ]; then cat "$errors"; fi
  rm -f "$errors"
}

status() {
  local state
  expected=ACTIVE
  state=$(state_of) || exit 1
  tell "$NAME: $state"
  case $state in
    ACTIVE | READY) on_all "$(worker_if_set_up current status)" || exit 1 ;;
    ABSENT) fail "there is no $NAME in $ZONE of $PROJECT; is NAME, ZONE or QUEUED another?" ;;
  esac
}

stop() {
  on_all "$(worker_if_set_up current stop)" || fail "could not stop it on all workers (see above)"
}

delete() {
  local force=()
  if [ "$QUEUED" = yes ]; then force=(--force); fi # with its nodes
  call compute tpus "$(resource)" delete "$NAME" ${force[@]+"${force[@]}"} || exit 1
  if [ -n "$BUCKET$SHARED" ]; then
    tell "$NAME is deleted; ${BUCKET:-$SHARED} is kept"
  else
    tell "$NAME is deleted; what lay on its own disk is gone"
  fi
}

check_keys
if [ "$verb" = create ]; then check_type; fi
if [ "$verb" = run ] && [ -z "$CONFIG" ]; then misuse "CONFIG is missing, for example CONFIG=configs/openmoji.py"; fi
case $verb in setup | run) check_revision ;; esac
if [ "$verb" = run ]; then check_run; fi
check_gcloud
"$verb"
