#!/usr/bin/env bash
# Checkpoints of real runs 0, 1, 10 and 100 steps after the 500th, then what they take as differences: ours, and with the
# packages of benches/peers/delta.py, on the same files.
#
#   bash benches/delta.sh FOLDER          # FIREBRICK_DATA names the folder with text/tinyshakespeare.txt
#   PYTHON=venv/bin/python                # with zstandard, zipnn, pcodec, numpy, safetensors
set -euo pipefail
cd "$(dirname "$0")/.."
runs=$(mkdir -p "$1" && cd "$1" && pwd)
cargo build --release --quiet
runner="${CARGO_TARGET_DIR:-target}/release/runner"
for config in nanogpt-char quickstart; do
  # A constant learning rate: every step of a run has the same.
  sed '/^min_lr_ratio/d; s/^name = "cosine".*/name = "constant"/' "configs/$config.toml" >"$runs/$config.toml"
  extra=()
  [ "$config" = nanogpt-char ] && extra=(--set "data.datasets.0.path=$FIREBRICK_DATA/text/tinyshakespeare.txt")
  for rate in 1e-3 1e-4 1e-5; do
    [ -d "$runs/$config-$rate/checkpoints/step-000600" ] && continue
    for steps in 500 501 510 600; do
      "$runner" train "$runs/$config.toml" "${extra[@]}" --output-dir "$runs/$config-$rate" --quiet \
        --set "optimizer.learning_rate=$rate" --set lr_scheduler.warmup_steps=50 --set "train.max_steps=$steps" \
        --set checkpoint.format=full --set checkpoint.save_steps=0 --set checkpoint.save_total_limit=0 \
        --set eval.eval_steps=0 --set 'eval.sample_prompts=[]' >/dev/null
    done
  done
done
# Memory that was freed is kept, as the runner keeps it.
MIMALLOC_PURGE_DELAY=-1 cargo bench --quiet --bench delta -- "$runs"
"${PYTHON:-python3}" benches/peers/delta.py "$runs"
