#!/usr/bin/env bash
# N processes of one run on the CPU of this machine, as on N hosts:
#   bash launch/local_processes.sh N --config configs/segthor.py --workdir RUN ...
# Process 0 talks here, the others into RUN.process<I>.log, in this folder where RUN is in a bucket.
# Ctrl-C and SIGTERM save and stop.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
if ! [ "${1:-0}" -gt 0 ] 2>/dev/null; then
  echo "usage: bash launch/local_processes.sh N --config CONFIG --workdir RUN ..." >&2
  exit 1
fi
count=$1
shift
source launch/workdir.sh
logs=${workdir:-run}
case $logs in *://*) logs=$(basename "$logs") ;; esac
python=${PYTHON:-.venv/bin/python}
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
export JAX_PLATFORMS=cpu

processes=() asked=
trap 'asked=yes; kill -TERM "${processes[@]}" 2>/dev/null' INT TERM
for ((i = 0; i < count; i++)); do
  line=("$python" -m cgs_jax.main "$@" --multihost --coordinator "localhost:$port"
    --processes "$count" --process "$i")
  if [ "$i" = 0 ]; then
    "${line[@]}" &
  else
    mkdir -p "$(dirname "$logs")"
    "${line[@]}" >"$logs.process$i.log" 2>&1 &
  fi
  processes+=($!)
done

code=0
for process in "${processes[@]}"; do
  wait "$process"
  ended=$?
  if [ -n "$asked" ] && [ "$ended" -gt 128 ]; then # the signal broke off the wait
    asked=
    wait "$process"
    again=$?
    if [ "$again" != 127 ]; then ended=$again; fi
  fi
  if [ "$ended" != 0 ]; then code=$ended; fi
done
exit "$code"
