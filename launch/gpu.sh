#!/usr/bin/env bash
# Trains on one node with GPUs, in one process with all of them or in several; under Slurm on several nodes.
#
#   bash launch/gpu.sh CONFIG=configs/openmoji.py WORKDIR=runs/mine [PROCESSES=1] [ARGS='...'] [--dry-run]
#
# Keys, each also read from the environment [default]:
#   CONFIG WORKDIR ARGS   of simvlg_jax.train           DEVICE [gpu]   cpu tries it without GPUs
#   PROCESSES [1]         each gets an equal share      PORT [any]     where the processes meet
#   GRACE [60]            seconds to save before the others of a failed process are ended
# With several processes, process 0 speaks here and process 1 into WORKDIR/process_1.log. Ctrl-C saves and stops; the
# same command resumes. In an sbatch script with one task for each GPU (--ntasks-per-node equal to --gpus-per-node)
# it starts them all with srun. --dry-run prints the commands and runs none.
set -euo pipefail
CONFIG=${CONFIG:-} WORKDIR=${WORKDIR:-} ARGS=${ARGS:-} PROCESSES=${PROCESSES:-1} DEVICE=${DEVICE:-gpu} PORT=${PORT:-}
GRACE=${GRACE:-60} DRY_RUN=no
usage=$(sed -n '2,12s/^# \{0,1\}//p' "$0")
# shellcheck source=launch/environment.sh
source "$(dirname "$0")/environment.sh"
exec 3>&1
case ${1:-} in
  '') say "$usage"; exit 2 ;;
  help | -h | --help) echo "$usage"; exit ;;
esac
read_keys 'CONFIG WORKDIR ARGS PROCESSES DEVICE PORT GRACE' "$@"

check_keys() {
  local file=${CONFIG%%:*} key
  [ -n "$CONFIG" ] || misuse "CONFIG is missing, for example CONFIG=configs/openmoji.py"
  [ -n "$WORKDIR" ] || misuse "WORKDIR is missing, for example WORKDIR=runs/mine"
  [ -f "$file" ] || wrong CONFIG "no config file $file"
  for key in PROCESSES GRACE ${PORT:+PORT}; do number "$key" "${!key}"; done
  [ "$PROCESSES" -ge 1 ] || wrong PROCESSES "PROCESSES is at least 1"
  case $DEVICE in gpu | cpu) ;; *) wrong DEVICE "DEVICE is gpu or cpu, not '$DEVICE'" ;; esac
  if slurm && [ "$PROCESSES" != 1 ]; then misuse "under Slurm its tasks are the processes: leave PROCESSES out"; fi
}

slurm() { [ -n "${SLURM_JOB_ID:-}" ] && [ "${SLURM_NTASKS:-1}" -gt 1 ]; }

count_gpus() {
  local visible
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    IFS=, read -r -a visible <<<"$CUDA_VISIBLE_DEVICES"
    echo ${#visible[@]}
  else
    { nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU' || true
  fi
}

check_gpus() {
  if [ "$DEVICE" = cpu ]; then gpus=0; return; fi
  gpus=$(count_gpus)
  if [ "$gpus" = 0 ]; then
    [ "$DRY_RUN" = yes ] || fail "nvidia-smi shows no GPU here; DEVICE=cpu tries it without"
    gpus=$PROCESSES
    say "note: nvidia-smi shows no GPU here; assuming $gpus, one for each process"
  fi
  [ $((gpus % PROCESSES)) = 0 ] || misuse "$gpus GPUs cannot be shared evenly by PROCESSES=$PROCESSES"
  # JAX gives each Slurm task the one GPU of its number on the node.
  if slurm && [ "$gpus" -gt "${SLURM_NTASKS_PER_NODE:-$gpus}" ]; then
    fail "$gpus GPUs and $SLURM_NTASKS_PER_NODE tasks on a node: the others would idle; sbatch --ntasks-per-node=$gpus"
  fi
}

prepare() {
  local files=(requirements.txt)
  if [ "$DEVICE" = gpu ]; then files+=(requirements-gpu.txt); fi
  dry need_environment "${files[@]}" || need_environment "${files[@]}"
}

# Each in a process group of its own, so that Ctrl-C reaches it once, from here: the second one would not save.
start_all() {
  local i each=$((gpus / PROCESSES)) variables
  dry mkdir -p "$WORKDIR" || mkdir -p "$WORKDIR"
  set -m
  for ((i = 0; i < PROCESSES; i++)); do
    variables=("JAX_COORDINATOR_ADDRESS=127.0.0.1:$PORT" "JAX_NUM_PROCESSES=$PROCESSES" "JAX_PROCESS_ID=$i")
    if [ "$each" -gt 0 ]; then variables+=("JAX_LOCAL_DEVICE_IDS=$(seq -s, $((i * each)) $((i * each + each - 1)))"); fi
    if dry env "${variables[@]}" "${train[@]}" --distributed "${arguments[@]}"; then continue; fi
    if [ "$i" = 0 ]; then
      env "${variables[@]}" "${train[@]}" --distributed "${arguments[@]}" &
    else
      env "${variables[@]}" "${train[@]}" --distributed "${arguments[@]}" >>"$WORKDIR/process_$i.log" 2>&1 &
    fi
    pids[i]=$!
  done
  set +m
}

signal_all() {
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do kill "-$1" "$pid" 2>/dev/null || true; done
}

pass_on() {
  stopping=yes
  say "SIG$1: passed on to all processes"
  signal_all "$1"
}

# Without one of them the others wait for ever.
end_others() {
  local i=$1 status=$2
  say "process $i failed with exit status $status"
  if [ "$i" != 0 ]; then say "the end of $WORKDIR/process_$i.log:"; tail -n 20 "$WORKDIR/process_$i.log" >&2; fi
  signal_all TERM
  deadline=$((SECONDS + GRACE))
}

wait_for_all() {
  local i status first=0 stopping='' deadline=''
  trap 'pass_on TERM' TERM
  trap 'pass_on INT' INT
  while [ ${#pids[@]} -gt 0 ]; do
    for i in "${!pids[@]}"; do
      if kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
      status=0
      wait "${pids[i]}" || status=$?
      unset 'pids[i]'
      if [ "$status" = 0 ] || [ "$first" != 0 ]; then continue; fi
      first=$status
      if [ -z "$stopping" ]; then end_others "$i" "$status"; fi
    done
    if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then
      for i in "${!pids[@]}"; do kill -KILL -- "-${pids[i]}" 2>/dev/null || true; done
    fi
    sleep 0.2
  done
  return "$first"
}

check_keys
check_gpus
prepare
PORT=${PORT:-$((20000 + RANDOM % 12000))} # below what systems hand out to connections
train=("$PYTHON" -m simvlg_jax.train) pids=()
read -r -d '' -a words <<<"$ARGS" || true
arguments=(--config "$CONFIG" --workdir "$WORKDIR" ${words[@]+"${words[@]}"})
JAX_PLATFORMS=cpu
if [ "$DEVICE" = gpu ]; then JAX_PLATFORMS=cuda,cpu; fi # named, the GPUs must work: no silent training on the CPU
dry export "JAX_PLATFORMS=$JAX_PLATFORMS" || export JAX_PLATFORMS
if slurm; then
  srun=(srun --kill-on-bad-exit=1)
  # Newer versions of srun do not take it over from sbatch, and one core could not feed a GPU.
  if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then srun+=("--cpus-per-task=$SLURM_CPUS_PER_TASK"); fi
  train=("${srun[@]}" "${train[@]}" --distributed "${arguments[@]}")
elif [ "$PROCESSES" = 1 ]; then
  train+=("${arguments[@]}")
else
  start_all
  wait_for_all
  exit
fi
dry "${train[@]}" || exec "${train[@]}"
