#!/usr/bin/env bash
# Four rows on ACDC: labelled slices alone, plainly and strongly augmented, CGS, and CGS without
# specialists; Dice, Jaccard, 95HD and ASD by organ over seeds, of the best and of the last checkpoint,
# by our scoring and by the literature's. FOLDER has SSL4MIS's h5 files.
#   bash launch/reproduce_acdc.sh FOLDER [--labelled 3|7] [--recipe paper|patches] [--seeds N]
#     [--workdir DIR] [OPTION ...]
# Recipe paper: 30,000 steps of 24 whole slices of 256 x 256. Recipe patches: 10,000 steps of 12
# windows of 128 x 128 pixels of them, for CPUs. Goes on where it was stopped. OPTION goes to
# cgs_jax.sweep, such as --config.model.dtype=bfloat16 or --rows=cgs.
set -euo pipefail
usage="bash launch/reproduce_acdc.sh FOLDER [--labelled 3|7] [--recipe paper|patches] [--seeds N]"
usage+=" [--workdir DIR] [OPTION ...]"
fail() { echo "error: $1; $usage" >&2; exit 1; }
[ -d "${1:-}" ] || fail "no folder ${1:-}"
folder=$(cd "$1" && pwd) && shift
labelled=7 recipe=paper seeds=3 workdir='' options=() fields=()
while [ $# -gt 0 ]; do
  case $1 in
    --labelled | --recipe | --seeds | --workdir)
      [ $# -gt 1 ] || fail "$1 needs a value"
      declare "${1#--}=$2"
      shift
      ;;
    --labelled=* | --recipe=* | --seeds=* | --workdir=*) declare "${1#--}" ;;
    --config.*=*) fields+=("$1") ;;
    --*=*) options+=("$1") ;;
    *) fail "$1 is no OPTION: write --name=value" ;;
  esac
  shift
done
[[ $labelled = [37] ]] || fail "--labelled $labelled: the paper has 3 and 7"
[[ $recipe = paper || $recipe = patches ]] || fail "--recipe $recipe: there are paper and patches"
[[ $seeds =~ ^[1-9][0-9]*$ ]] || fail "--seeds $seeds: give a number from 1 on"
case $workdir in '' | /*) ;; *) workdir=$PWD/$workdir ;; esac
cd "$(dirname "$0")/.."
source launch/venv.sh -r requirements.txt
workdir=${workdir:-runs/acdc_${labelled}_$recipe}
config=configs/acdc.py:labelled=$labelled,recipe=$recipe
rows=supervised,supervised_strong,cgs,cgs_without_specialists
fields=(--config.data.root="$folder" "${fields[@]}")
echo "== a run of CGS on this device"
measured=$(.venv/bin/python -m cgs_jax.benchmark --config "$config" "${fields[@]}" \
  --stages step --seconds 10) || echo "no estimate of the time"
echo "$measured"
echo "$measured" | awk -v seeds="$seeds" '/^training/ {
  printf "== the four rows, %d seeds: about %.3g h of steps;", seeds, seeds * $5 * 10 / 3
  print " compilation, validation and scores come on top" }'
exec .venv/bin/python -m cgs_jax.sweep --config "$config" "${fields[@]}" \
  --sweep configs/sweeps/ablation.py --rows="$rows" --workdir "$workdir" --seeds "$seeds" \
  "${options[@]}"
