"""llama.cpp's TQ2_0 matrix products, for benches/ternary to be held against in one run.

    pip install llama-cpp-python numpy      (builds ggml for this machine)
    cargo bench --bench ternary -- --peer "python benches/peers/ternary_tq2.py"

Answers requests, one JSON object a line: {"size", "tokens", "threads", "matrices", "calls"} in, {"seconds": [...]} out,
one value for each call. A call computes one ggml graph with one mul_mat node: TQ2_0 weights [size, size]
times f32 activations, which ggml quantises to Q8_K itself. With `matrices` more than one, calls go through so many
different ones in turn, and go on where the last request ended.
"""

import ctypes
import glob
import importlib.util
import json
import os
import sys
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


class Products:
    """Weights of one size, as many as were asked for, and the graphs of one number of tokens and threads."""

    def __init__(self, ggml):
        self.ggml, self.rng = ggml, np.random.default_rng(1)
        self.weights, self.graphs, self.contexts = (None, []), (None, []), [None, None]
        self.next = 0

    def context(self, index, size):
        if self.contexts[index] is not None:
            self.ggml.ggml_free(self.contexts[index])
        self.contexts[index] = self.ggml.ggml_init(InitParams(size, None, False))
        return self.contexts[index]

    def tensors(self, size, count):
        if self.weights[0] != size or len(self.weights[1]) < count:
            self.graphs = (None, [])
            length = size * size // BLOCK * BLOCK_BYTES
            context = self.context(0, count * (length + 4096))
            data = random_blocks(self.rng, size * size // BLOCK)
            made = [self.ggml.ggml_new_tensor_2d(context, TQ2_0, size, size) for _ in range(count)]
            for copy, tensor in enumerate(made):
                array(self.ggml, tensor, np.uint8, length)[:] = np.roll(data, copy * BLOCK_BYTES)
            self.weights = (size, made)
        return self.weights[1]

    def prepare(self, size, tokens, threads, count):
        ggml, tensors = self.ggml, self.tensors(size, count)[:count]
        if self.graphs[0] == (size, tokens, threads, count):
            return self.graphs[1]
        # Each graph has an output of its own.
        context = self.context(1, count * (size * tokens * 4 + 65536) + size * tokens * 4 + 65536)
        x = ggml.ggml_new_tensor_2d(context, F32, size, tokens)
        array(ggml, x, np.float32, size * tokens)[:] = self.rng.standard_normal(size * tokens)
        graphs = []
        for tensor in tensors:
            graph = ggml.ggml_new_graph_custom(context, 8, False)
            ggml.ggml_build_forward_expand(graph, ggml.ggml_mul_mat(context, tensor, x))
            plan = ggml.ggml_graph_plan(graph, threads, None)
            work = ctypes.create_string_buffer(max(1, plan.work_size))
            plan.work_data = ctypes.cast(work, ctypes.c_void_p)
            graphs.append((graph, plan, work))
        self.graphs = ((size, tokens, threads, count), graphs)
        return graphs

    def seconds(self, size, tokens, threads, matrices, calls):
        graphs = self.prepare(size, tokens, threads, matrices)
        times = []
        for _ in range(calls):
            graph, plan, _ = graphs[self.next % len(graphs)]
            self.next += 1
            started = time.perf_counter()
            self.ggml.ggml_graph_compute(graph, ctypes.byref(plan))
            times.append(time.perf_counter() - started)
        return times


def main():
    products = Products(load())
    for line in sys.stdin:
        print(json.dumps({"seconds": products.seconds(**json.loads(line))}), flush=True)


if __name__ == "__main__":
    main()
