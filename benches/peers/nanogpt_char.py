#!/usr/bin/env python3
"""The character-level setting of nanoGPT's README for CPUs, in eager PyTorch: the peer of
configs/nanogpt-char.toml.

Same text, split, tokens, shape, initialisation scheme, optimizer groups, batch, clipping and
schedule; the windows are random offsets from its own generator. Validation covers the whole split
in chunks of block + 1 tokens overlapping by one.

    python benches/peers/nanogpt_char.py TINYSHAKESPEARE [--seed 1] [--steps 2000] [--threads 2]
prints one JSON object: val_loss, training seconds (evaluation apart), milliseconds per step (median).
"""

import argparse
import json
import math
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F

BLOCK, BATCH, LAYERS, HEADS, WIDTH = 64, 12, 4, 4, 128
PEAK, FLOOR, WARMUP, BETAS, DECAY, CLIP = 1e-3, 0.1, 100, (0.9, 0.99), 0.1, 1.0


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, bias=False)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.attention_out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm2 = nn.LayerNorm(WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        batch, seq, _ = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, seq, 3, HEADS, WIDTH // HEADS)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(y.transpose(1, 2).reshape(batch, seq, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    def __init__(self, vocab):
        super().__init__()
        self.tokens = nn.Embedding(vocab, WIDTH)
        self.positions = nn.Embedding(BLOCK, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("attention_out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * LAYERS) if residual else 0.02)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


def learning_rate(step, steps):
    if step < WARMUP:
        return PEAK * (step + 1) / (WARMUP + 1)
    progress = (step - WARMUP) / max(1, steps - 1 - WARMUP)
    return PEAK * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def validate(model, split):
    nats, count = 0.0, 0
    starts = list(range(0, len(split) - 1, BLOCK))
    for first in range(0, len(starts), 64):
        for length in (BLOCK, None):
            rows = [split[s : s + BLOCK + 1] for s in starts[first : first + 64]]
            rows = [r for r in rows if (len(r) == BLOCK + 1) == (length is not None)]
            if not rows:
                continue
            rows = torch.stack(rows)
            logits = model(rows[:, :-1])
            nats += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
            count += rows[:, 1:].numel()
    assert count == len(split) - 1
    return nats / count


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("text")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    text = open(args.text, encoding="utf-8").read()
    ids = {c: i for i, c in enumerate(sorted(set(text)))}
    data = torch.tensor([ids[c] for c in text])
    cut = int(len(data) * 0.9)
    train, val = data[:cut], data[cut:]

    model = Gpt(len(ids))
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=BETAS, eps=1e-8)
    times = []
    for step in range(args.steps):
        started = time.perf_counter()
        offsets = torch.randint(len(train) - BLOCK, (BATCH,))
        rows = torch.stack([train[o : o + BLOCK + 1] for o in offsets])
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps)
        optimizer.step()
        loss.item()
        times.append(time.perf_counter() - started)
    print(
        json.dumps(
            {
                "who": f"torch {torch.__version__} eager",
                "seed": args.seed,
                "parameters": sum(p.numel() for p in model.parameters()),
                "val_loss": round(validate(model, val), 4),
                "train_seconds": round(sum(times), 2),
                "ms_per_step": round(1000 * statistics.median(times), 2),
            }
        )
    )


if __name__ == "__main__":
    main()
