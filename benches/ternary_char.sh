#!/usr/bin/env bash
# What ternary weights cost in quality: configs/llama-char.toml and configs/ternary-char.toml, which differ in
# [quantization] alone, at their width and at twice that, three seeds.
#
#   bash benches/ternary_char.sh TINYSHAKESPEARE [STEPS] > record.jsonl
#
# WIDTHS="128" trains at those widths alone, RUNNER names a binary that is built already.
# One JSON object a line: config, width, seed, parameters, val_loss over the whole split, seconds, cpu.
set -euo pipefail
cd "$(dirname "$0")/.."
text=$1 steps=${2:-2000}
[ -n "${RUNNER:-}" ] || cargo build --release --quiet
runner="${RUNNER:-${CARGO_TARGET_DIR:-target}/release/runner}"
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT

train() { # config width seed
  local run="$runs/$1-$2-$3"
  "$runner" train "configs/$1.toml" --quiet --resume never --output-dir "$run" \
    --set "data.datasets.0.path=$text" --set "train.max_steps=$steps" --set "seed=$3" \
    --set "model.hidden_size=$2" --set "model.intermediate_size=$(($2 * 43 / 16))" \
    --set "model.num_attention_heads=$(($2 / 32))" \
    --set eval.eval_steps=0 --set 'eval.sample_prompts=[]' --set checkpoint.save_steps=0 >/dev/null
  python3 - "$run" "$@" <<'PY'
import json, sys
folder, config, width, seed = sys.argv[1:]
record = json.load(open(f"{folder}/run.json"))
print(json.dumps({
    "config": config, "width": int(width), "seed": int(seed), "parameters": record["parameters"],
    "val_loss": round(record["final"]["val_loss"], 4), "seconds": round(record["final"]["seconds"], 1),
    "cpu": record["environment"]["cpu"], "threads": record["environment"]["threads"],
}), flush=True)
PY
}

for width in ${WIDTHS:-128 256}; do
  for seed in 1 2 3; do
    train llama-char "$width" "$seed"
    train ternary-char "$width" "$seed"
  done
done
