#!/usr/bin/env bash
# configs/nanogpt-char.toml and configs/llama-char.toml beside the same training in PyTorch
# (nanogpt_char.py), three seeds, interleaved in one run on one machine.
#
#   PYTHON=/path/to/venv/bin/python bash benches/peers/nanogpt_char.sh TINYSHAKESPEARE [STEPS] > record.jsonl
#
# PYTHON needs torch. One JSON object a line: who, seed, parameters, val_loss over the whole split,
# train_seconds (evaluation and saving apart), ms_per_step (median).
set -euo pipefail
cd "$(dirname "$0")/../.."
text=$1 steps=${2:-2000} python=${PYTHON:-python3}
cargo build --release --quiet
runner="${CARGO_TARGET_DIR:-target}/release/runner"
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT

ours() { # config seed
  "$runner" train "configs/$1.toml" --quiet --resume never --output-dir "$runs/$1-$2" \
    --set "data.datasets.0.path=$text" --set "train.max_steps=$steps" --set "seed=$2" \
    --set eval.eval_steps=0 --set 'eval.sample_prompts=[]' --set checkpoint.save_steps=0 \
    --set logging.logging_steps=1 >/dev/null
  "$python" - "$runs/$1-$2" "$1" "$2" <<'PY'
import json, statistics, sys
folder, name, seed = sys.argv[1:]
record = json.load(open(f"{folder}/run.json"))
rows = [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]
# logging_steps = 1 makes the speed of a row that of its own step.
tokens = rows[0]["tokens"]
seconds = [tokens / row["tokens_per_second"] for row in rows]
print(json.dumps({
    "who": f"firebrick {name}", "seed": int(seed), "parameters": record["parameters"],
    "val_loss": round(record["final"]["val_loss"], 4), "train_seconds": round(sum(seconds), 2),
    "ms_per_step": round(1000 * statistics.median(seconds), 2),
    "cpu": record["environment"]["cpu"], "threads": record["environment"]["threads"],
}))
PY
}

for seed in 1 2 3; do
  "$python" benches/peers/nanogpt_char.py "$text" --seed "$seed" --steps "$steps"
  ours nanogpt-char "$seed"
  ours llama-char "$seed"
done
