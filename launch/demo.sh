#!/usr/bin/env bash
# From a fresh machine to trained models and pictures in under 10 minutes on 2 cores: makes .venv,
# writes phantom CT scans, trains the labelled-only baseline and CGS, and compares them by organ.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/demo}
source launch/venv.sh -r requirements.txt
python=.venv/bin/python

$python -m cgs_jax.data.phantom --out "$out/scans"
options=(
  --config.data.root="$out/scans" --config.data.size=128
  --config.total_steps=300 --config.eval_every=100
)
for method in supervised cgs; do
  echo "== $method"
  batch=(--config.batch.labelled=6)
  if [ $method = supervised ]; then batch=(--config.batch.labelled=12); else batch+=(--config.batch.unlabelled=6); fi
  $python -m cgs_jax.main --config configs/segthor.py:method=$method,labelled=3 \
    --workdir "$out/$method" "${options[@]}" "${batch[@]}"
done
$python -m cgs_jax.compare "$out/supervised" "$out/cgs"
echo "pictures: $out/{supervised,cgs}/{curves,overlays}.png"
