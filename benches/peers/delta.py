"""zstd, zipnn and pcodec on the checkpoints that benches/delta.sh has trained.

    pip install zstandard zipnn pcodec numpy safetensors
    python benches/peers/delta.py RUNS

Each gets the file's numbers as they are, and their XOR with the parent's; zstd gets the XOR in byte planes, too. One
line a file: ratios, and the speed of the best in GB/s of the child's bytes, one thread.
"""

import sys
import time
from pathlib import Path

import numpy as np
import zipnn
import zstandard
from pcodec import ChunkConfig, standalone
from safetensors.numpy import load_file


def bits(path):
    """All numbers of a file, in the order of names, as u32."""
    tensors = load_file(path)
    return np.concatenate([tensors[name].reshape(-1).view(np.uint32) for name in sorted(tensors)])


def to_bf16(numbers):
    wide = numbers.astype(np.uint64)
    return ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)


def planes(numbers):
    return np.ascontiguousarray(numbers.view(np.uint8).reshape(-1, numbers.dtype.itemsize).T).tobytes()


def timed(work):
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def peers(dtype):
    zstd = zstandard.ZstdCompressor(level=3)
    unzstd = zstandard.ZstdDecompressor()

    def pcodec(numbers):
        coded, encode = timed(lambda: standalone.simple_compress(numbers, ChunkConfig()))
        _, decode = timed(lambda: standalone.simple_decompress(coded))
        return len(coded), encode, decode

    def zip(numbers):
        name = {"f32": "float32", "bf16": "bfloat16"}[dtype]
        codec = zipnn.ZipNN(bytearray_dtype=name, input_format="byte", threads=1)
        data = numbers.tobytes()
        coded, encode = timed(lambda: codec.compress(data))
        _, decode = timed(lambda: codec.decompress(coded))
        return len(coded), encode, decode

    def zstd3(data):
        coded, encode = timed(lambda: zstd.compress(data))
        _, decode = timed(lambda: unzstd.decompress(coded))
        return len(coded), encode, decode

    return {
        "zstd file": lambda child, xor: zstd3(child.tobytes()),
        "zstd planes": lambda child, xor: zstd3(planes(xor)),
        "zipnn file": lambda child, xor: zip(child),
        "zipnn xor": lambda child, xor: zip(xor),
        "pco file": lambda child, xor: pcodec(child.view(np.float32) if dtype == "f32" else child),
        "pco xor": lambda child, xor: pcodec(xor),
    }


def main(runs):
    names = list(peers("f32"))
    print(f"{'run':<20}{'steps':>5}  {'of':<14}" + "".join(f"{name:>13}" for name in names) + "   best: encode  decode")
    for run in sorted(path for path in Path(runs).iterdir() if (path / "checkpoints").is_dir()):
        for steps in (1, 10, 100):
            for file, dtype, what in (
                ("model", "f32", "weights f32"),
                ("model", "bf16", "weights bf16"),
                ("optimizer", "f32", "moments f32"),
            ):
                at = lambda step: bits(run / f"checkpoints/step-{step:06}/{file}.safetensors")
                before, after = at(500), at(500 + steps)
                if dtype == "bf16":
                    before, after = to_bf16(before), to_bf16(after)
                xor = before ^ after
                results = {name: peer(after, xor) for name, peer in peers(dtype).items()}
                ratio = {name: after.nbytes / size for name, (size, _, _) in results.items()}
                best = max(ratio, key=ratio.get)
                _, encode, decode = results[best]
                speeds = f"{after.nbytes / encode / 1e9:>13.2f}{after.nbytes / decode / 1e9:>8.2f}"
                row = "".join(f"{ratio[name]:>13.3f}" for name in names)
                print(f"{run.name:<20}{steps:>5}  {what:<14}{row}{speeds}", flush=True)


main(sys.argv[1])
