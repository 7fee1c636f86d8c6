#!/usr/bin/env bash
# The paper's ACDC table: supervised and CGS, 30,000 iterations at 256 x 256, Dice, Jaccard, 95HD and
# ASD by organ over seeds, of the best and of the last checkpoint; then CGS scored by our defaults.
# FOLDER has SSL4MIS's h5 files.
#   bash launch/reproduce_acdc.sh FOLDER [--labelled 3|7] [--seeds N] [--workdir DIR] [OPTION ...]
# Goes on where it was stopped. OPTION goes to cgs_jax.sweep, such as --config.model.dtype=bfloat16
# or --rows=cgs.
set -euo pipefail
usage="bash launch/reproduce_acdc.sh FOLDER [--labelled 3|7] [--seeds N] [--workdir DIR] [OPTION ...]"
if [ $# -eq 0 ] || [ ! -d "$1" ]; then
  echo "error: no folder ${1:-}; $usage" >&2
  exit 1
fi
folder=$(cd "$1" && pwd) && shift
cd "$(dirname "$0")/.."
labelled=7 seeds=3 workdir='' options=()
while [ $# -gt 0 ]; do
  case $1 in
    --labelled | --seeds | --workdir)
      [ $# -gt 1 ] || { echo "error: $1 needs a value; $usage" >&2; exit 1; }
      declare "${1#--}=$2"
      shift
      ;;
    *) options+=("$1") ;;
  esac
  shift
done
source launch/venv.sh -r requirements.txt
config=(--config "configs/acdc.py:labelled=$labelled" --config.data.root="$folder")
fields=()
for option in "${options[@]}"; do
  case $option in --config.*) fields+=("$option") ;; esac
done
echo "== a run of CGS on this device"
measured=$(.venv/bin/python -m cgs_jax.benchmark "${config[@]}" "${fields[@]}" --stages step --seconds 10)
echo "$measured"
echo "$measured" | awk -v seeds="$seeds" '/^training/ {
  printf "== all, %d seeds of CGS and of supervised (2/3 of a step): about %.3g h and validation\n",
    seeds, seeds * $5 * 5 / 3 }'
workdir=${workdir:-runs/acdc_$labelled}
.venv/bin/python -m cgs_jax.sweep "${config[@]}" --sweep configs/sweeps/paper.py \
  --seeds "$seeds" --workdir "$workdir" "${options[@]}"
for run in "$workdir"/cgs/seed*; do
  [ -d "$run" ] || continue
  echo "== $run, by our defaults: probabilities interpolated, largest components"
  .venv/bin/python -m cgs_jax.ensemble --workdir "$run" --upsample linear --largest_component
done
