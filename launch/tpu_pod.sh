#!/usr/bin/env bash
# A run on all workers of a Cloud TPU slice:
#   bash launch/tpu_pod.sh [--dry-run] COMMAND [OPTIONS OF cgs_jax.main]
#     create     ask for the slice
#     install    copy the last commit of this checkout to every worker and install it
#     run        start training on all workers
#     resume     the same, after a stop or preemption (on a new slice: create and install first)
#     log        follow what worker 0 prints
#     stop       SIGTERM to all workers: they save and end
#     delete     give the slice back
# What it takes from the environment, with its defaults:
#   NAME=cgs ZONE=us-west4-a TYPE=v5litepod-16 VERSION=v2-alpha-tpuv5-lite SPOT= PYTHON=python3
# PYTHON is that of the workers, 3.11 or newer; where Ubuntu 22.04 has none, install python3.11-venv.
# --workdir and the data must be where all workers see them: a mounted bucket or NFS.
# Example:
#   ZONE=us-west4-a bash launch/tpu_pod.sh run --config configs/acdc.py --workdir /mnt/nfs/runs/acdc \
#     --config.data.root=/mnt/nfs/acdc --config.data.cache=/tmp/cache --config.model.dtype=bfloat16 \
#     --config.mesh.space=4   # 16 chips share 12 images
# --dry-run prints the gcloud lines instead of running them.
set -euo pipefail
cd "$(dirname "$0")/.."
NAME=${NAME:-cgs} ZONE=${ZONE:-us-west4-a} TYPE=${TYPE:-v5litepod-16}
VERSION=${VERSION:-v2-alpha-tpuv5-lite} SPOT=${SPOT:-}

dry=
if [ "${1:-}" = --dry-run ]; then
  dry=yes
  shift
fi
command=${1:-help}
shift || true

call() {
  if [ -z "$dry" ]; then
    "$@"
    return
  fi
  for word in "$@"; do
    case $word in *[!A-Za-z0-9_./:=,-]*) printf '%s ' "${word@Q}" ;; *) printf '%s ' "$word" ;; esac
  done
  echo
}
on_workers() { # WHICH, and a line for their shells
  call gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" --command="$2"
}

case $command in
  create)
    call gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" \
      --version="$VERSION" ${SPOT:+--spot}
    ;;
  install)
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    call git archive --format=tar.gz --output="$archive" HEAD
    call gcloud compute tpus tpu-vm scp "$archive" "$NAME:cgs_jax.tar.gz" --zone="$ZONE" --worker=all
    on_workers all 'set -e; mkdir -p cgs_jax && tar xzf cgs_jax.tar.gz -C cgs_jax && cd cgs_jax && PYTHON='"${PYTHON:-python3}"' source launch/venv.sh -r requirements.txt jax[tpu]'
    ;;
  run | resume)
    arguments=$(printf '%q ' "$@")
    start="nohup .venv/bin/python -m cgs_jax.main --multihost $arguments"
    on_workers all "cd cgs_jax && $start>> train.log 2>&1 < /dev/null &"
    ;;
  log) on_workers 0 'tail -n 100 -F cgs_jax/train.log' ;;
  stop) on_workers all 'pkill -TERM -f [c]gs_jax.main' ;;
  delete) call gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE" --quiet ;;
  *)
    sed -n '2,/^set /{s/^# \{0,1\}//p}' "$0"
    [ "$command" = help ] || exit 1
    ;;
esac
