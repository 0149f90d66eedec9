#!/usr/bin/env bash
# Whether two binaries train alike, bit for bit: every file in configs/ and examples/recipes, 50 steps
# on the CPU with either of them, and then the metrics (all but speed and memory) and the exported
# weights compared.
#
#   FIREBRICK_DATA=folder benches/before_after.sh BEFORE AFTER [STEPS [NAME]]
#
# NAME trains only the file with that name.
#
# FIREBRICK_DATA has text/tinyshakespeare.txt, gsm8k/train.jsonl, instruct/ and stories260K/hf, which
# stands for every base model. A change of the sources changes what quickstart trains on: both binaries
# are run in the same folder, this repository.
set -euo pipefail
cd "$(dirname "$0")/.."
before=$(realpath "$1")
after=$(realpath "$2")
steps=${3:-50}
only=${4:-*}
data=$(realpath "${FIREBRICK_DATA:?names the folder with the data}")
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
# Each binary makes its own tokens.
base=$data/stories260K/hf

for config in configs/$only.toml examples/recipes/$only.toml; do
  [ -e "$config" ] || continue
  name=$(basename "$config" .toml)
  # The length is 50 steps, whatever it was counted in.
  sed -E "s/^(num_epochs|max_steps|max_tokens) *=.*/max_steps = $steps/" "$config" >"$runs/$name.toml"
  sets=(--set device.backend=cpu --set eval.eval_steps=25 --set checkpoint.save_steps=20
    --set logging.logging_steps=1)
  grep -q '^warmup_steps' "$config" && sets+=(--set lr_scheduler.warmup_steps=5)
  grep -q '^base_model' "$config" && sets+=(--set "model.base_model=$base" --set data.overlong=drop --set data.sequence_len=512)
  case $(grep -oE 'data/[a-z0-9-]+\.(txt|jsonl)' "$config" | head -n 1) in
    data/tinyshakespeare.txt) file=text/tinyshakespeare.txt ;;
    data/gsm8k-train.jsonl) file=gsm8k/train.jsonl ;;
    data/instructions.jsonl) file=instruct/alpaca_en_demo.json ;;
    # Rows of conversations are longer than the base model's 512 positions; these are short.
    data/conversations.jsonl) file=instruct/identity.json ;;
    data/preferences.jsonl) file=instruct/dpo_en_demo.json ;;
    *) file= ;;
  esac
  [ -z "$file" ] || sets+=(--set "data.datasets.0.path=$data/$file")
  for side in before after; do
    XDG_CACHE_HOME="$runs/cache-$side" "${!side}" train "$runs/$name.toml" "${sets[@]}" --quiet \
      --output-dir "$runs/$side/$name" >"$runs/$side-$name.txt" 2>&1 ||
      { cat "$runs/$side-$name.txt"; exit 1; }
  done
  python3 - "$runs" "$name" <<'PYTHON'
import hashlib, json, pathlib, sys
runs, name = pathlib.Path(sys.argv[1]), sys.argv[2]

def metrics(side):
    rows = [json.loads(line) for line in open(runs / side / name / "metrics.jsonl")]
    return [{k: v for k, v in row.items() if k not in ("tokens_per_second", "memory_bytes")} for row in rows]

def weights(side):
    folder = runs / side / name
    file = next(folder / f for f in ("model.safetensors", "adapter_model.safetensors") if (folder / f).exists())
    return hashlib.sha256(file.read_bytes()).hexdigest()

old, new = metrics("before"), metrics("after")
same = old == new and weights("before") == weights("after")
last = new[-1]
print(f"{name:16} {len(new)} rows, loss {last['loss']!r}, val {last.get('val_loss')!r}, "
      f"weights {weights('after')[:16]}: {'equal' if same else 'DIFFERENT'}")
if not same:
    for a, b in zip(old, new):
        if a != b:
            print("  before", a, "\n  after ", b)
            break
    sys.exit(1)
PYTHON
done
