"""Holds adapters against the real peft package, both ways, over tiny models of every family.

    pip install torch transformers peft safetensors
    cargo build --release
    python benches/peers/peft_adapters.py target/release/runner

Theirs to ours: peft adapters with random weights; `runner logits --adapter` has to give peft's
logits to 1e-4. Ours to theirs: adapters that `runner train` has trained; peft has to give ours. The
merged model (`runner merge`) has to give the same in transformers without peft.
With `--write FOLDER` the adapters and logits of the first kind are kept, for tests/adapter.rs.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

logging.disable_progress_bar()

TOLERANCE = 1e-4
TOKENS = [1, 7, 300, 42, 42, 0, 319, 5, 17, 200, 111, 3]

KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"NARROW": 2}, "alpha_pattern": {"NARROW": 3}},
    "saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "head": {},
}

FAMILIES = ["llama", "qwen2", "qwen3", "phi3", "gpt2"]


def targets(family, kind):
    return blocks(family) + (["lm_head"] if kind == "head" else [])


def blocks(family):
    if family == "phi3":
        return ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    if family == "gpt2":
        return ["c_attn", "c_proj", "c_fc"]
    return ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_folder(family, work, references):
    if family != "gpt2":
        return references / family
    folder = work / "gpt2-base"
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=320, n_positions=64, n_embd=64, n_layer=2, n_head=4,
                        activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0,
                        attn_pdrop=0.0, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def load(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].float()


def runner_logits(runner, model, adapter, work):
    out = work / "logits.safetensors"
    command = [runner, "logits", "--model", model, "--tokens", ",".join(map(str, TOKENS)), "--out", out]
    if adapter is not None:
        command += ["--adapter", adapter]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    return load_file(out)["logits"]


def theirs(family, kind, base, folder):
    options = json.loads(json.dumps(KINDS[kind]).replace("NARROW", blocks(family)[-1]))
    torch.manual_seed(sum(map(ord, family + kind)))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets(family, kind), task_type="CAUSAL_LM",
                        fan_in_fan_out=family == "gpt2", **options)
    model = get_peft_model(load(base), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_A" in name:
                parameter.normal_(0, 0.2)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
            elif "modules_to_save" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
            elif "lm_head.base_layer" in name:
                # It is saved beside its update, and loaded in the place of the base model's.
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return logits_of(model)


def ours(runner, family, kind, base, work):
    text = work / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog 0123456789\n" * 40)
    options = {
        "lora": "", "rslora": "use_rslora = true", "dora": 'type = "dora"',
        "patterns": f'rank_pattern = {{ {blocks(family)[-1]} = 2 }}\nalpha_pattern = {{ {blocks(family)[-1]} = 3.0 }}',
        "saved": 'modules_to_save = ["lm_head", "embed_tokens"]',
        "head": 'target_modules = ["all-linear", "lm_head"]',
    }[kind]
    config = work / "run.toml"
    config.write_text(f"""
output_dir = "{work}/run"
[model]
base_model = "{base}"
[tokenizer]
type = "byte"
[adapter]
r = 4
lora_alpha = 8
{options}
[data]
sequence_len = 16
[[data.datasets]]
path = "{text}"
[train]
micro_batch_size = 4
max_steps = 20
[optimizer]
learning_rate = 1e-2
[logging]
report_to = ["jsonl"]
""")
    subprocess.run([str(runner), "train", str(config), "-q"], check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    return work / "run"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runner", type=Path)
    parser.add_argument("--references", type=Path, default=Path("tests/data/reference"))
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    worst, count = 0.0, 0
    for family in FAMILIES:
        for kind in KINDS:
            work = Path(tempfile.mkdtemp())
            base = base_folder(family, work, args.references)
            tied = json.loads((base / "config.json").read_text()).get("tie_word_embeddings", family == "gpt2")
            if kind in ["saved", "head"] and tied:
                continue
            adapter = work / "adapter"
            expected = theirs(family, kind, base, adapter)
            errors = {"theirs": (runner_logits(args.runner, base, adapter, work) - expected).abs().max().item()}
            if args.write and family != "gpt2":
                kept = args.write / f"{family}-{kind}"
                kept.mkdir(parents=True, exist_ok=True)
                for name in ["adapter_config.json", "adapter_model.safetensors"]:
                    shutil.copy(adapter / name, kept / name)
                save_file({"tokens": torch.tensor(TOKENS), "logits": expected}, kept / "reference.safetensors")
            run = ours(args.runner, family, kind, base, work)
            mine = runner_logits(args.runner, base, run, work)
            errors["ours"] = (logits_of(PeftModel.from_pretrained(load(base), run).eval()) - mine).abs().max().item()
            merged = work / "merged"
            subprocess.run([str(args.runner), "merge", "--model", str(base), "--adapter", str(run), "--out", str(merged)],
                           check=True, stdout=subprocess.DEVNULL)
            errors["merged"] = (logits_of(load(merged)) - mine).abs().max().item()
            moved = (mine - logits_of(load(base))).abs().max().item()
            print(f"{family:8} {kind:9} " + "  ".join(f"{name} {error:.1e}" for name, error in errors.items())
                  + f"  (training moved logits by {moved:.2f})", flush=True)
            worst, count = max(worst, *errors.values()), count + len(errors)
            shutil.rmtree(work)
    print(f"{count} comparisons, largest difference of a logit {worst:.1e} (limit {TOLERANCE:.0e})")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
