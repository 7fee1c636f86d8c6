#!/usr/bin/env bash
# The paper's ACDC table: supervised and CGS, 30,000 iterations at 256 x 256, Dice, Jaccard, 95HD and
# ASD by organ over seeds, of the best and of the last checkpoint; CGS is scored by our defaults, too.
# FOLDER has SSL4MIS's h5 files.
#   bash launch/reproduce_acdc.sh FOLDER [--labelled 3|7] [--seeds N] [--workdir DIR] [OPTION ...]
# Goes on where it was stopped. OPTION goes to cgs_jax.sweep, such as --config.model.dtype=bfloat16
# or --rows=cgs.
set -euo pipefail
usage="bash launch/reproduce_acdc.sh FOLDER [--labelled 3|7] [--seeds N] [--workdir DIR] [OPTION ...]"
fail() { echo "error: $1; $usage" >&2; exit 1; }
[ -d "${1:-}" ] || fail "no folder ${1:-}"
folder=$(cd "$1" && pwd) && shift
labelled=7 seeds=3 workdir='' options=() fields=()
while [ $# -gt 0 ]; do
  case $1 in
    --labelled | --seeds | --workdir)
      [ $# -gt 1 ] || fail "$1 needs a value"
      declare "${1#--}=$2"
      shift
      ;;
    --labelled=* | --seeds=* | --workdir=*) declare "${1#--}" ;;
    --config.*=*) fields+=("$1") ;;
    --*=*) options+=("$1") ;;
    *) fail "$1 is no OPTION: write --name=value" ;;
  esac
  shift
done
[[ $labelled = [37] ]] || fail "--labelled $labelled: the paper has 3 and 7"
[[ $seeds =~ ^[1-9][0-9]*$ ]] || fail "--seeds $seeds: give a number from 1 on"
case $workdir in '' | /*) ;; *) workdir=$PWD/$workdir ;; esac
cd "$(dirname "$0")/.."
packages=(-r requirements.txt)
if nvidia-smi -L >/dev/null 2>&1 && ! .venv/bin/pip list 2>/dev/null | grep -q '^jax-cuda'; then
  packages+=('jax[cuda12]')
fi
source launch/venv.sh "${packages[@]}"
workdir=${workdir:-runs/acdc_$labelled}
fields=(--config.data.root="$folder" "${fields[@]}")
sweep() {
  .venv/bin/python -m cgs_jax.sweep --config "configs/acdc.py:labelled=$labelled" "${fields[@]}" \
    --sweep configs/sweeps/paper.py --workdir "$workdir" --seeds "$seeds" --rows=supervised,cgs \
    "${options[@]}"
}

echo "== a run of CGS on this device"
measured=$(.venv/bin/python -m cgs_jax.benchmark --config "configs/acdc.py:labelled=$labelled" \
  "${fields[@]}" --stages step --seconds 10) || echo "no estimate of the time"
echo "$measured"
echo "$measured" | awk -v seeds="$seeds" '/^training/ {
  printf "== all, %d seeds of CGS and of supervised (2/3 of a step): about %.3g h of steps;", \
    seeds, seeds * $5 * 5 / 3
  print " compilation, validation and scores come on top" }'
sweep
# Our scoring needs no training of its own, but a folder; it gets its name when it is whole.
for run in "$workdir"/cgs/seed*; do
  scored=$workdir/cgs_our_scoring/${run##*/} half=$workdir/scoring_$(uname -n)
  if [ -e "$run/report.html" ] && [ ! -e "$scored" ]; then
    rm -rf "$half"
    mkdir -p "$half" "$workdir/cgs_our_scoring"
    cp -r "$run"/{checkpoints,config.json,splits.json,metrics.jsonl,times.jsonl} "$half"
    .venv/bin/python -m cgs_jax.main --config "configs/acdc.py:method=cgs,labelled=$labelled" \
      "${fields[@]}" --config.seed="${run##*/seed}" --config.total_steps=0 --workdir "$half"
    [ -e "$scored" ] || mv "$half" "$scored"
  fi
done
sweep
