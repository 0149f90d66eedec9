"""LoRA training beside torch + peft (+ bitsandbytes): tokens a second and peak memory, interleaved.

    pip install torch transformers peft bitsandbytes accelerate
    cargo build --release
    python benches/peers/qlora.py target/release/runner --tokenizer gpt2/tokenizer.json --text text.txt

The model is a random LLaMA of 124M parameters, r = 16 on all linear layers, one sequence of 512
tokens a step, f32, AdamW, as many threads for both. `dense` is LoRA beside f32 weights, `nf4` beside
NF4 with double quantisation. Each side runs in a process of its own, in turn, so that both meet the
same machine; of the steps the fastest counts (neighbours only ever slow one down).
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOKENS = 512
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peer(folder, kind, steps, threads):
    """Runs in a process of its own: prints seconds of each step and the peak of its memory."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    options = {}
    if kind == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32)
        options["device_map"] = {"": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    if kind == "nf4":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()
    seconds, losses = [], []
    for step in range(steps):
        ids = torch.randint(0, 50257, (1, TOKENS), generator=torch.Generator().manual_seed(step))
        begun = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - begun)
        losses.append(loss.item())
    print(json.dumps({"seconds": seconds, "losses": losses,
                      "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def run_peer(folder, kind, steps, threads):
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), TORCH_COMPILE_DISABLE="1")
    out = subprocess.run([sys.executable, __file__, "--peer", kind, "--folder", str(folder), "--steps", str(steps),
                          "--threads", str(threads)], check=True, capture_output=True, text=True, env=environment)
    return json.loads(out.stdout.strip().splitlines()[-1])


def run_ours(runner, folder, kind, steps, threads, text, work):
    out = work / "run"
    shutil.rmtree(out, ignore_errors=True)
    quantization = '[quantization]\nweights = "nf4"\ndouble_quant = true\n' if kind == "nf4" else ""
    config = work / "run.toml"
    config.write_text(f"""
output_dir = "{out}"
[model]
base_model = "{folder}"
dtype = "f32"
[adapter]
r = 16
lora_alpha = 32
{quantization}
[data]
sequence_len = {TOKENS}
val_fraction = 0.0
[[data.datasets]]
path = "{text}"
[train]
micro_batch_size = 1
max_steps = {steps}
threads = {threads}
[optimizer]
learning_rate = 1e-4
[checkpoint]
save_steps = 0
[logging]
logging_steps = 1
report_to = ["jsonl"]
[device]
backend = "cpu"
""")
    subprocess.run([str(runner), "train", str(config), "-q"], check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    run = json.loads((out / "run.json").read_text())
    estimate = json.loads(subprocess.run([str(runner), "estimate", str(config), "--json"], check=True,
                                         capture_output=True, text=True).stdout)
    return {"seconds": [TOKENS / row["tokens_per_second"] for row in rows], "rss": run["final"]["peak_rss_bytes"],
            "estimate": estimate["peak_bytes"]}


def base_folder(work, tokenizer):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = work / "base"
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50257, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
                         num_attention_heads=12, num_key_value_heads=12, max_position_embeddings=1024,
                         tie_word_embeddings=True, bos_token_id=50256, eos_token_id=50256)
    LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copy(tokenizer, folder / "tokenizer.json")
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runner", type=Path, nargs="?")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", choices=["dense", "nf4"])
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.peer:
        return peer(args.folder, args.peer, args.steps, args.threads)
    work = Path(tempfile.mkdtemp())
    try:
        folder = base_folder(work, args.tokenizer)
        for kind in ["dense", "nf4"]:
            ours, theirs = [], []
            for _ in range(args.rounds):
                theirs.append(run_peer(folder, kind, args.steps, args.threads))
                ours.append(run_ours(args.runner, folder, kind, args.steps, args.threads, args.text, work))
            # The first step of each run pays for what later ones reuse.
            best = lambda runs: TOKENS / min(s for run in runs for s in run["seconds"][1:])
            median = lambda runs: TOKENS / statistics.median(s for run in runs for s in run["seconds"][1:])
            peak = lambda runs: max(run["rss"] for run in runs)
            print(json.dumps({
                "kind": kind, "threads": args.threads,
                "tokens_per_second": round(best(ours)), "peer_tokens_per_second": round(best(theirs)),
                "ratio": round(best(ours) / best(theirs), 3),
                "median": round(median(ours)), "peer_median": round(median(theirs)),
                "median_ratio": round(median(ours) / median(theirs), 3),
                "peak_rss": peak(ours), "peer_peak_rss": peak(theirs),
                "rss_ratio": round(peak(ours) / peak(theirs), 3),
                "estimate": ours[0]["estimate"], "estimate_over_peak": round(ours[0]["estimate"] / peak(ours), 3),
            }), flush=True)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
