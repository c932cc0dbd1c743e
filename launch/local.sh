#!/usr/bin/env bash
# From a bare machine to captions: installs, prepares the example data, trains, evaluates, writes the report.
#
#   bash launch/local.sh [MINUTES=10] [WORKDIR=runs/openmoji] [DATA=data]
#
# MINUTES is the time for training the vision encoder and the connector together; 0 trains to the config's last step.
# Run again to go on where it stopped. Needs Python 3.11 or newer; a network connection the first time only.
set -euo pipefail
MINUTES=${MINUTES:-10} WORKDIR=${WORKDIR:-runs/openmoji} DATA=${DATA:-data}
for argument in "$@"; do
  case $argument in
    MINUTES=* | WORKDIR=* | DATA=*) declare "$argument" ;;
    *) sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
done
# shellcheck source=launch/environment.sh
source "$(dirname "$0")/environment.sh"
case $MINUTES in '' | *[!0-9.]* | *.*.*) fail "MINUTES must be a number, got '$MINUTES'" ;; esac
need_environment requirements.txt requirements-example.txt

run() { say "+ $*"; "$@"; }
share() { awk -v m="$MINUTES" -v part="$1" 'BEGIN {printf "%.3f", m * part}'; }
vit="$WORKDIR/vit/vit.safetensors"

run "$PYTHON" -m simvlg_jax.data.prepare --data_dir "$DATA"
if [ ! -f "$vit" ]; then
  say "== 1/3 vision encoder: learns which name goes with which picture =="
  run "$PYTHON" -m simvlg_jax.train --config configs/openmoji.py:vit --workdir "$WORKDIR/vit" \
    "--config.data.dir=$DATA" "--config.train.max_minutes=$(share 0.4)"
fi
say "== 2/3 connector: teaches the frozen language model to read the pictures =="
run "$PYTHON" -m simvlg_jax.train --config configs/openmoji.py --workdir "$WORKDIR" \
  "--config.data.dir=$DATA" "--config.vit.weights=$vit" "--config.train.max_minutes=$(share 0.6)"
say "== 3/3 held-out pictures =="
run "$PYTHON" -m simvlg_jax.evaluate --workdir "$WORKDIR"
run "$PYTHON" -m simvlg_jax.samples --workdir "$WORKDIR"

say ""
say "report:       $WORKDIR/report.html"
say "results:      $WORKDIR/eval/test.json, $WORKDIR/eval/novel.json"
say "curves:       $WORKDIR/metrics.jsonl (TensorBoard: $WORKDIR/tensorboard)"
say "try next:     bash launch/local.sh                                      trains for longer"
say "              $PYTHON -m simvlg_jax.caption --workdir $WORKDIR PICTURE...   names your own pictures"
say "              $PYTHON -m simvlg_jax.caption --example PICTURE...        the same with the trained example"
