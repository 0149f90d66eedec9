"""llama.cpp's TQ2_0 matrix products, for benches/ternary.rs to be held against.

    pip install llama-cpp-python numpy      (builds ggml for this machine)
    python benches/peers/ternary_tq2.py [--threads 1 2] [--sizes 2048 5120 12800] [--tokens 1 16 64 512]

One ggml graph with one mul_mat node: TQ2_0 weights [size, size] times f32 activations, which ggml quantises
to Q8_K itself. One JSON object a line, the keys of `cargo bench --bench ternary -- --json`. `hot` multiplies with
one matrix again and again; `rotating` with 1 GiB of them in turn. Medians.
"""

import argparse
import ctypes
import glob
import importlib.util
import json
import os
import statistics
import time

import numpy as np

F32, TQ2_0, BLOCK, BLOCK_BYTES = 0, 35, 256, 66


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class Plan(ctypes.Structure):
    _fields_ = [
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("n_threads", ctypes.c_int),
        ("threadpool", ctypes.c_void_p),
        ("abort_callback", ctypes.c_void_p),
        ("abort_callback_data", ctypes.c_void_p),
        ("use_ref", ctypes.c_bool),
    ]


def load():
    # Found without being imported: that would load the rest of llama.cpp.
    package = os.path.dirname(importlib.util.find_spec("llama_cpp").origin)
    for name in ("libggml-base", "libggml-cpu"):
        [library, *_] = glob.glob(os.path.join(package, "lib", name + ".*"))
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    ggml = ctypes.CDLL(None)
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("ggml_init", pointer, [InitParams]),
        ("ggml_free", None, [pointer]),
        ("ggml_new_tensor_2d", pointer, [pointer, ctypes.c_int, i64, i64]),
        ("ggml_get_data", pointer, [pointer]),
        ("ggml_mul_mat", pointer, [pointer, pointer, pointer]),
        ("ggml_new_graph_custom", pointer, [pointer, ctypes.c_size_t, ctypes.c_bool]),
        ("ggml_build_forward_expand", None, [pointer, pointer]),
        ("ggml_graph_plan", Plan, [pointer, ctypes.c_int, pointer]),
        ("ggml_graph_compute", ctypes.c_int, [pointer, ctypes.POINTER(Plan)]),
        ("ggml_cpu_init", None, []),
    ):
        function = getattr(ggml, name)
        function.restype, function.argtypes = result, arguments
    ggml.ggml_cpu_init()
    return ggml


def array(ggml, tensor, dtype, count):
    address = ggml.ggml_get_data(tensor)
    return np.frombuffer((ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(address), dtype=dtype)


def random_blocks(rng, blocks):
    """TQ2_0 blocks: 256 codes 0, 1 or 2 in 64 bytes, then an f16 scale."""
    codes = rng.integers(0, 3, size=(blocks, 4, 64), dtype=np.uint8)
    packed = codes[:, 0] | codes[:, 1] << 2 | codes[:, 2] << 4 | codes[:, 3] << 6
    scales = rng.uniform(0.5, 1.5, size=(blocks, 1)).astype(np.float16).view(np.uint8).reshape(blocks, 2)
    return np.concatenate([packed, scales], axis=1).reshape(-1)


class Matrices:
    """As many different matrices as fill 1 GiB, at most 1,024."""

    def __init__(self, ggml, size, rng):
        self.ggml, self.size = ggml, size
        self.bytes = size * size // BLOCK * BLOCK_BYTES
        count = min(1024, -(-(1 << 30) // self.bytes))
        self.context = ggml.ggml_init(InitParams(count * (self.bytes + 4096), None, False))
        data = random_blocks(rng, size * size // BLOCK)
        self.tensors = []
        for copy in range(count):
            tensor = ggml.ggml_new_tensor_2d(self.context, TQ2_0, size, size)
            array(ggml, tensor, np.uint8, self.bytes)[:] = np.roll(data, copy * BLOCK_BYTES)
            self.tensors.append(tensor)

    def seconds(self, tokens, threads, rng):
        """Seconds of one product: with one matrix, and with all in turn."""
        ggml, size = self.ggml, self.size
        # Each graph has an output of its own: with many tokens, fewer graphs.
        tensors = self.tensors if tokens == 1 else self.tensors[:8]
        per_graph = size * tokens * 4 + 65536
        context = ggml.ggml_init(InitParams(len(tensors) * per_graph + size * tokens * 4 + 65536, None, False))
        x = ggml.ggml_new_tensor_2d(context, F32, size, tokens)
        array(ggml, x, np.float32, size * tokens)[:] = rng.standard_normal(size * tokens)
        runs = []
        for tensor in tensors:
            graph = ggml.ggml_new_graph_custom(context, 8, False)
            ggml.ggml_build_forward_expand(graph, ggml.ggml_mul_mat(context, tensor, x))
            plan = ggml.ggml_graph_plan(graph, threads, None)
            work = ctypes.create_string_buffer(max(1, plan.work_size))
            plan.work_data = ctypes.cast(work, ctypes.c_void_p)
            runs.append((graph, plan, work))

        def median(count, run):
            times = []
            for i in range(count):
                graph, plan, _ = runs[run(i)]
                started = time.perf_counter()
                ggml.ggml_graph_compute(graph, ctypes.byref(plan))
                times.append(time.perf_counter() - started)
            return statistics.median(times)

        count = int(min(300, max(5, 4e10 / (2 * tokens * size * size))))
        median(2, lambda i: 0)
        hot = median(count, lambda i: 0)
        rotating = median(min(count, len(runs)), lambda i: i % len(runs))
        ggml.ggml_free(context)
        return {"hot": hot, "rotating": rotating}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 5120, 12800])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 512])
    arguments = parser.parse_args()
    ggml, rng = load(), np.random.default_rng(1)
    for size in arguments.sizes:
        matrices = Matrices(ggml, size, rng)
        for tokens in arguments.tokens:
            for threads in arguments.threads:
                for cache, seconds in matrices.seconds(tokens, threads, rng).items():
                    row = {"who": "ggml-tq2_0", "size": size, "tokens": tokens, "threads": threads, "cache": cache}
                    print(json.dumps(row | {"seconds": seconds}), flush=True)
        ggml.ggml_free(matrices.context)


if __name__ == "__main__":
    main()
