#!/usr/bin/env bash
# configs/speedrun-char.toml beside the training it is held against, three seeds, one after another in one run on one
# machine: nanoGPT's setting in PyTorch (benches/peers/nanogpt_char.py) and configs/llama-char.toml, 2,000 steps each.
#
#   PYTHON=/path/to/venv/bin/python bash benches/speedrun/char.sh TINYSHAKESPEARE > record.jsonl
#
# PYTHON needs torch. PART=torch or PART=llama runs only one of the two comparisons. One JSON object a line: who, seed, steps, parameters, val_loss over the whole split,
# train_seconds (evaluation and saving apart). The last lines are the ratios, by seed and as geometric means:
# PyTorch's seconds over ours where our loss is not above its, and llama-char's over ours with more steps.
set -euo pipefail
cd "$(dirname "$0")/../.."
text=$(realpath "$1") python=${PYTHON:-python3} long=${LONG:-680} rate=${RATE:-6e-3} part=${PART:-both}
cargo build --release --quiet
runner="${CARGO_TARGET_DIR:-target}/release/runner"
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT

ours() { # name config seed [KEY=VALUE...]
  local name=$1 config=$2 seed=$3 folder="$runs/$1-$3" sets=()
  shift 3
  for set in "$@"; do sets+=(--set "$set"); done
  "$runner" train "configs/$config.toml" --quiet --resume never --output-dir "$folder" \
    --set "data.datasets.0.path=$text" --set "seed=$seed" --set eval.eval_steps=0 \
    --set 'eval.sample_prompts=[]' --set checkpoint.save_steps=0 "${sets[@]}" >/dev/null
  "$python" - "$folder" "$name" "$seed" <<'PY'
import json, sys
folder, name, seed = sys.argv[1:]
record = json.load(open(f"{folder}/run.json"))
final = record["final"]
print(json.dumps({
    "who": name, "seed": int(seed), "steps": final["step"], "parameters": record["parameters"],
    "val_loss": round(final["val_loss"], 4), "train_seconds": round(final["train_seconds"], 2),
    "cpu": record["environment"]["cpu"], "threads": record["environment"]["threads"],
}))
PY
}

for seed in 1 2 3; do
  if [ "$part" != llama ]; then
    "$python" benches/peers/nanogpt_char.py "$text" --seed "$seed" --steps 2000
    ours speedrun-char speedrun-char "$seed"
  fi
  if [ "$part" != torch ]; then
    ours llama-char llama-char "$seed"
    ours speedrun-char-long speedrun-char "$seed" "train.max_steps=$long" "optimizer.learning_rate=$rate"
  fi
done | tee "$runs/all.jsonl"

"$python" - "$runs/all.jsonl" <<'PY'
import json, math, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
by = {(row["who"].split(",")[0], row["seed"]): row for row in rows}
names = {name for name, _ in by}
torch = next((name for name in names if name.startswith("torch")), None)
for other, mine in ((torch, "speedrun-char"), ("llama-char", "speedrun-char-long")):
    if other not in names:
        continue
    ratios = []
    for seed in (1, 2, 3):
        theirs, ours = by[other, seed], by[mine, seed]
        ratio = theirs["train_seconds"] / ours["train_seconds"]
        ratios.append(ratio)
        print(json.dumps({"seed": seed, "seconds_of": other, "over_those_of": mine, "ratio": round(ratio, 2),
                          "loss_difference": round(ours["val_loss"] - theirs["val_loss"], 4)}))
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(json.dumps({"seconds_of": other, "over_those_of": mine, "geometric_mean": round(mean, 2)}))
PY
