#!/usr/bin/env bash
# All that an accelerator is to show, in MINUTES: what a step of the UNet takes, with and without
# specialists, against what the device can do; our step and PyTorch's in turn, where PyTorch is
# there; the paper's setting on ACDC with 7 and 3 labelled patients, side by side, for as many of 3
# seeds as there is time; and what the other steps take, of float32 and of TransUNet.
#   bash launch/accelerator.sh OUT [--acdc FOLDER] [--minutes MINUTES] [--tiny]
# OUT gets a JSON file a figure, log.txt, which has the comparison with PyTorch, and the runs on FOLDER,
# which has SSL4MIS's h5 files. The same command leaves out what is done, and goes on with the runs.
# --tiny has small shapes, to try the script on any machine. JAX_PYTHON names a Python that has the
# packages; without it .venv is made. The exit code is 1 if a part did not finish.
set -euo pipefail
usage="bash launch/accelerator.sh OUT [--acdc FOLDER] [--minutes MINUTES] [--tiny]"
fail() { echo "error: $1; $usage" >&2; exit 1; }
case ${1:-} in '' | -*) fail "no folder OUT" ;; esac
mkdir -p "$1" && out=$(cd "$1" && pwd) && shift
acdc='' minutes=20 tiny=''
while [ $# -gt 0 ]; do
  case $1 in
    --acdc | --minutes)
      [ $# -gt 1 ] || fail "$1 needs a value"
      declare "${1#--}=$2"
      shift
      ;;
    --tiny) tiny=yes ;;
    *) fail "unknown $1" ;;
  esac
  shift
done
[[ $minutes =~ ^[1-9][0-9]*$ ]] || fail "--minutes $minutes: give a number from 1 on"
[ -z "$acdc" ] || acdc=$(cd "$acdc" 2>/dev/null && pwd) || fail "no such folder of --acdc"
end=$(($(date +%s) + 60 * minutes))
cd "$(dirname "$0")/.."
if [ -z "${JAX_PYTHON:-}" ]; then
  source launch/venv.sh -r requirements.txt
  JAX_PYTHON=.venv/bin/python
fi
"$JAX_PYTHON" -c 'import jax' || fail "$JAX_PYTHON has no jax"
names=() begun=() pids=() # of all parts; of those that run now

begin() { # NAME COMMAND ...: starts a part that is not done, if there is time
  local name=$1 left=$((end - $(date +%s)))
  shift
  names+=("$name")
  [ ! -e "$out/$name.done" ] || return 0
  if [ "$left" -le 0 ]; then
    echo "== $name: no time left" | tee -a "$out/log.txt"
    return 0
  fi
  echo "== $name: $*" | tee -a "$out/log.txt"
  # 180 s: a run that compiles hears of it late.
  timeout --kill-after=180 "$left" "$@" \
    > >(trap "" INT; sed -u "s/^/$name: /" | tee -ai "$out/log.txt") 2>&1 &
  begun+=("$name") pids+=($!)
}

finish() { # waits for what runs; a failure does not keep the rest back
  local i
  for i in "${!pids[@]}"; do
    if wait "${pids[i]}"; then
      touch "$out/${begun[i]}.done"
    else
      echo "== ${begun[i]} did not finish" | tee -a "$out/log.txt"
    fi
  done
  begun=() pids=()
}

# However this ends, what runs gets SIGTERM: runs save, and go on when they are started again.
trap '[ ${#pids[@]} -eq 0 ] || kill "${pids[@]}" 2>/dev/null || true; wait' EXIT
trap 'exit 130' INT TERM HUP

dtypes=(bfloat16 float32) scans=${acdc:-none}
step=(--seconds 15)
# Both programs are compiled anew for every row, in 1 to 2 minutes each.
pairs=(--rounds 1 --seconds 10 --steps 20 --pairs "lean:lean,lean:authors")
unet=() transunet=(--config.data.size=224) runs=() # options of each
if [ -n "$tiny" ]; then
  scans=none
  unet=(--config.data.size=32 --config.batch.labelled=2 --config.batch.unlabelled=2)
  transunet=("${unet[@]}" '--config.model.units=(1,1,1)' --config.model.width=.125)
  transunet+=(--config.model.groups=4 --config.model.hidden=8 --config.model.mlp=12)
  transunet+=(--config.model.heads=2 --config.model.layers=1 '--config.model.decoder=(8,8,8,4,4)')
  unet+=('--config.model.channels=(4,4,4,4,8)')
  runs=("${unet[@]}" --config.total_steps=4)
  dtypes=(float32) # others compile for minutes on a CPU
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_backend_optimization_level=0"
  step=(--seconds 1 --stages "step,specialists,loop")
  pairs=(--rounds 1 --seconds 1 --steps 1 --size 32 --batch 4 --pairs lean:lean)
fi
gpu=''
if nvidia-smi -L >/dev/null 2>&1; then gpu=yes pairs+=(--gpu); fi

time_step() { # MODEL DTYPE
  local -n options=$1
  begin "step_$1_$2" "$JAX_PYTHON" -m cgs_jax.benchmark \
    --config "configs/acdc.py:method=cgs,model=$1" --config.data.root="$scans" \
    --config.model.dtype="$2" "${options[@]}" "${step[@]}" --output "$out/step_$1_$2.json"
  finish
}

time_step unet "${dtypes[0]}"
if "$JAX_PYTHON" -c 'import torch' 2>/dev/null; then
  begin pytorch "$JAX_PYTHON" benchmarks/compare.py "${pairs[@]}"
  finish
fi
if [ -n "$acdc" ]; then
  for labelled in 7 3; do
    begin "acdc_$labelled" env XLA_PYTHON_CLIENT_PREALLOCATE=false "$JAX_PYTHON" -m cgs_jax.sweep \
      --config "configs/acdc.py:labelled=$labelled" --sweep configs/sweeps/ablation.py \
      --rows=cgs --workdir "$out/acdc_$labelled" --seeds 3 --config.data.root="$acdc" \
      --config.model.dtype="${dtypes[0]}" --config.eval_every=3000 --config.pseudo_slices=0 \
      "${runs[@]}"
    # On a GPU both train at once: one computes while the other compiles, validates or scores.
    [ -n "$gpu" ] || finish
  done
  finish
fi
time_step transunet "${dtypes[0]}"
for dtype in "${dtypes[@]:1}"; do
  time_step unet "$dtype"
  time_step transunet "$dtype"
done
echo "log: $out/log.txt"
for name in "${names[@]}"; do [ -e "$out/$name.done" ] || exit 1; done
