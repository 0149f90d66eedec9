#!/usr/bin/env bash
# Predicted steps against computed ones, on configs/llama-char.toml.
#
#   bash benches/predict/run.sh TINYSHAKESPEARE > record.jsonl
#
# Overhead: the default settings turn prediction off after the first comparison. Short runs with and without it take
# turns; the line after them has the median of the ratios of their seconds, and the ratio of their FLOPs.
# Equal passes: prediction is forced on (one step in four, never off). 1,333 steps with it have the backward passes of
# 1,000 without, 1,200 steps have their arithmetic (a predicted step costs a third of a computed one). The learning rate
# decays over the run's own steps. Two seeds.
# One JSON object a line.
set -euo pipefail
cd "$(dirname "$0")/../.."
text=$(realpath "$1") turns=${TURNS:-20}
cargo build --release --quiet
runner="${CARGO_TARGET_DIR:-target}/release/runner"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The same file with one phase of predicted steps.
cp configs/llama-char.toml "$work/full.toml"
{ cat configs/llama-char.toml; printf '\n[[phase]]\nlength = "rest"\nmode = "predict"\n'; } >"$work/default.toml"
for method in momentum least_squares weights; do
  cp "$work/default.toml" "$work/$method.toml"
  echo "predict = { method = \"$method\", every = 4, min_cosine = -1.0, max_rejections = 1000000 }" >>"$work/$method.toml"
done

train() { # name config seed steps
  local folder="$work/run"
  rm -rf "$folder"
  "$runner" train "$work/$2.toml" --quiet --resume never --output-dir "$folder" \
    --set "data.datasets.0.path=$text" --set "seed=$3" --set "train.max_steps=$4" --set eval.eval_steps=0 \
    --set 'eval.sample_prompts=[]' --set checkpoint.save_steps=0 >/dev/null
  python3 - "$folder" "$1" "$3" <<'PY'
import csv, json, sys
folder, name, seed = sys.argv[1:]
record = json.load(open(f"{folder}/run.json"))
final = record["final"]
last = list(csv.DictReader(open(f"{folder}/metrics.csv")))
columns = {}
for row in last:
    columns.update({key: value for key, value in row.items() if value})
print(json.dumps({
    "who": name, "seed": int(seed), "steps": final["step"], "val_loss": round(final["val_loss"], 4),
    "backward_passes": final["backward_passes"], "flops": final["flops"], "train_seconds": round(final["train_seconds"], 3),
    "predicted": columns.get("predicted"), "rejected": columns.get("rejected"), "cosine": columns.get("cosine"),
    "cpu": record["environment"]["cpu"], "threads": record["environment"]["threads"],
}))
PY
}

for turn in $(seq "$turns"); do
  train "overhead: computed" full "$turn" 200
  train "overhead: default" default "$turn" 200
done | tee "$work/turns.jsonl"
python3 - "$work/turns.jsonl" <<'PY'
import json, statistics, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
pairs = list(zip(rows[::2], rows[1::2]))
seconds = [b["train_seconds"] / a["train_seconds"] for a, b in pairs]
flops = [b["flops"] / a["flops"] for a, b in pairs]
print(json.dumps({"overhead": "default over computed", "turns": len(pairs), "median_of_seconds": round(statistics.median(seconds), 4),
                  "least": round(min(seconds), 4), "most": round(max(seconds), 4), "flops": round(statistics.median(flops), 5)}))
PY
for seed in 1337 1338; do
  train computed full "$seed" 1000
  for method in momentum least_squares weights; do
    train "$method, equal passes" "$method" "$seed" 1333
    train "$method, equal arithmetic" "$method" "$seed" 1200
  done
done
