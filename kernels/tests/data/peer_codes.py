"""Makes bitsandbytes.txt and stories260K.txt: what bitsandbytes' CPU path makes of some numbers.

    pip install torch bitsandbytes==0.50.2 safetensors blake3
    python peer_codes.py [model.safetensors of stories260K]

The first line is the signed dynamic map as f32 in hexadecimal, little-endian. A case is five lines: a name; format and block; the
numbers; codes; absmax.
Of the model, a line for each matrix and format: its name, the format, and BLAKE3 of codes and absmax.
"""

import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import blake3
import numpy as np
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent


def quantise(values, kind, block):
    """Codes as bytes, absmax as f32."""
    codes, state = bnb.quantize_4bit(torch.from_numpy(values), quant_type=kind, blocksize=block)
    return codes.numpy().tobytes(), state.absmax.numpy().tobytes()


def borders(kind):
    """Numbers on each border of two codes and beside it, in blocks whose largest magnitude is 1."""
    levels = np.sort(bnb.get_4bit_type(kind, device="cpu").numpy())
    middles = ((levels[:-1] + levels[1:]) / 2).astype(np.float32)
    near = [np.nextafter(middles, np.float32(s), dtype=np.float32) for s in (-2, 2)]
    return np.concatenate([[np.float32(1)], middles, *near, [np.float32(-1)]]).astype(np.float32)


def cases():
    rng = np.random.default_rng(1)
    normal = lambda n: rng.standard_normal(n).astype(np.float32)
    for kind in ("nf4", "fp4"):
        yield "normal", kind, 64, normal(512)
        yield "weights", kind, 128, normal(256) * np.float32(0.02)
        yield "ragged", kind, 64, normal(171)
        yield "one", kind, 64, normal(1)
        yield "short", kind, 64, normal(14)
        yield "zeros", kind, 64, np.zeros(131, np.float32)
        yield "zeros among others", kind, 64, normal(192) * np.repeat([1, 0, 1], 64).astype(np.float32)
        yield "negative zeros", kind, 64, -np.zeros(70, np.float32)
        yield "borders", kind, 64, borders(kind)
        yield "borders in a full block", kind, 64, np.resize(borders(kind), 64)
        yield "subnormal", kind, 64, normal(130) * np.float32(1e-41)
        yield "around the smallest divisor", kind, 64, normal(130) * np.float32(1e-38)
        yield "huge", kind, 64, np.clip(normal(130) / 3, -1, 1) * np.finfo(np.float32).max
        yield "one large", kind, 64, np.concatenate([normal(90) * np.float32(1e-3), [np.float32(1e4)]])


def main():
    lines = [bnb.create_dynamic_map().numpy().tobytes().hex()]
    for name, kind, block, values in cases():
        values = values.astype(np.float32)
        codes, absmax = quantise(values, kind, block)
        lines += [name, f"{kind} {block}", values.tobytes().hex(), codes.hex(), absmax.hex()]
    (HERE / "bitsandbytes.txt").write_text("\n".join(lines) + "\n")
    for path in sys.argv[1:]:
        lines = []
        for name, tensor in sorted(load_file(path).items()):
            if tensor.ndim != 2:
                continue
            for kind in ("nf4", "fp4"):
                codes, absmax = quantise(tensor.float().contiguous().numpy(), kind, 64)
                lines.append(f"{name} {kind} {blake3.blake3(codes + absmax).hexdigest()}")
        (HERE / "stories260K.txt").write_text("\n".join(lines) + "\n")


main()
