"""Times the cpu backend's kernels at the shapes of SmolLM2-135M, beside what the machine can do at most.

    python benchmarks/cpu_kernels.py [--threads 2] [--formats int4 bfloat16] [--linear] [--model]

`--linear`: each linear layer at 1, 8 and 128 rows, with weights that are not in the cache. `--model`: whole steps of
30 layers with random weights: decode at batch 1 and 8, and a prefill of 128 tokens. Each number is the best of several.
"""

import argparse
import ctypes
import os
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from trtllm_cli.kernels.cpu import attention_steps, compiler, library, row_steps
from trtllm_cli.kernels.cpu.pack import pack_linear, step_arguments
from trtllm_cli.kernels.linear_format import LinearFormat
from trtllm_cli.run.model_inputs import ModelInputs

SHAPES = [(576, 960), (576, 576), (576, 3072), (1536, 576), (576, 49152)]  # in, out
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCAB = 30, 576, 9, 3, 64, 1536, 49152
FORMATS = ("float32", "bfloat16", "int8", "int4", "fp8")
GROUP_SIZES = {"int8": 64, "int4": 32}  # fp8 has a scale an output
BLOCK_SIZE = 32
CACHE_BYTES = 100 << 20  # weights of a shape are copied until they are larger than this


def floors(num_threads):
    """(bytes per second, flops per second) of the machine."""
    source = Path(__file__).with_name("machine_floors.cpp")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "floors.so")
        flags = [compiler.FEATURE_FLAGS[f] for f in compiler.host_features()]
        subprocess.run([str(compiler.find_compiler()), "-O2", "-fPIC", "-shared", "-pthread", *flags, str(source), "-o",
                        str(path)], check=True)  # fmt: skip
        lib = ctypes.CDLL(str(path))
    lib.bytes_per_second.restype = lib.flops_per_second.restype = ctypes.c_double
    return lib.bytes_per_second(num_threads), lib.flops_per_second(num_threads)


def address(x):
    return None if x is None else x.data_ptr() if isinstance(x, torch.Tensor) else x.ctypes.data


class Linear:
    """A random packed weight; `step` makes its step."""

    def __init__(self, in_features, out_features, fmt):
        stored = LinearFormat(fmt, GROUP_SIZES.get(fmt))
        self.packed = pack_linear(torch.randn(out_features, in_features) * in_features**-0.5, stored)
        self.nbytes = sum(t.nbytes for t in self.packed.values())
        self.arguments = {"in_features": in_features, "out_features": out_features, **step_arguments(stored)}

    def copy(self):
        other = object.__new__(Linear)
        other.__dict__ = {**self.__dict__, "packed": {k: t.clone() for k, t in self.packed.items()}}
        return other

    def step(self, x, out, **more):
        scale = address(self.packed.get("scale"))
        return library.linear_step(address(x), address(out), address(self.packed["weight"]), scale=scale,
                                   **self.arguments, **more)  # fmt: skip


def batch_of(lengths, context):
    """Sequence s computes lengths[s] tokens after `context` earlier ones; blocks one after another."""
    blocks = -(-(context + max(lengths)) // BLOCK_SIZE)
    tables = np.arange(len(lengths) * blocks, dtype=np.int32).reshape(len(lengths), blocks)
    positions = np.concatenate([np.arange(context, context + n) for n in lengths]).astype(np.int32)
    owners = np.concatenate([np.full(n, s) for s, n in enumerate(lengths)])
    start = np.cumsum([0, *lengths]).astype(np.int32)
    slots = tables[owners, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    return ModelInputs(
        input_ids=np.arange(len(positions), dtype=np.int32), positions=positions, slot_mapping=slots.astype(np.int32),
        block_tables=tables, query_start=start, seq_lens=np.array([context + n for n in lengths], np.int32),
        logits_indices=start[1:] - 1,
    )  # fmt: skip


def best_time(pool, steps, inputs, repeats):
    """Seconds of the fastest run."""
    plan, batch = library.plan(steps), library.TlBatch.of(inputs)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        pool.run(plan, batch)
        times.append(time.perf_counter() - start)
    return min(times)


def report_linears(pool, formats, bandwidth, flops, seconds):
    print(f"\n{'shape':>14} {'format':>9} {'rows':>5} {'us':>9} {'GB/s':>7} {'GFLOP/s':>8} {'of floor':>8}")
    for in_features, out_features in SHAPES:
        for fmt in formats:
            first = Linear(in_features, out_features, fmt)
            layers = [first] + [first.copy() for _ in range(CACHE_BYTES // first.nbytes)]
            for rows in (1, 8, 128):
                x = np.random.default_rng(0).standard_normal((rows, in_features), np.float32)
                out = np.empty((rows, out_features), np.float32)
                steps = [layer.step(x, out) for layer in layers]
                once = best_time(pool, steps, batch_of([rows], 0), 1)
                took = best_time(pool, steps, batch_of([rows], 0), max(3, int(seconds / once))) / len(layers)
                work = 2 * rows * in_features * out_features
                floor = max(first.nbytes / bandwidth, work / flops)
                print(f"{in_features:>6} -> {out_features:<5} {fmt:>8} {rows:>5} {took * 1e6:>9.1f} "
                      f"{first.nbytes / took / 1e9:>7.1f} {work / took / 1e9:>8.1f} {floor / took:>7.0%}")  # fmt: skip


class Model:
    """SmolLM2-135M's plan with random weights."""

    def __init__(self, fmt, max_tokens, max_seqs, cache_dtype="bfloat16", max_len=1024):
        self.layers = [
            [Linear(i, o, fmt) for i, o in SHAPES[:4]] for _ in range(LAYERS)
        ]  # fmt: skip
        self.head = Linear(HIDDEN, VOCAB, fmt)
        self.nbytes = self.head.nbytes + sum(linear.nbytes for layer in self.layers for linear in layer)
        self.shape = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "block_size": BLOCK_SIZE,
                      "cache_dtype": cache_dtype}  # fmt: skip
        width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
        sizes = {"h": HIDDEN, "n": HIDDEN, "qkv": width, "q": HIDDEN, "a": HIDDEN, "gu": 2 * INTERMEDIATE,
                 "g": INTERMEDIATE}  # fmt: skip
        self.buffers = {name: torch.zeros(max_tokens, size) for name, size in sizes.items()}
        self.logits_in, self.logits = torch.zeros(max_seqs, HIDDEN), torch.zeros(max_seqs, VOCAB)
        self.norm, self.rope = torch.ones(HIDDEN), torch.ones(max_len, HEAD_DIM)
        self.table = torch.randn(VOCAB, HIDDEN).bfloat16()
        blocks = max_seqs * -(-max_len // BLOCK_SIZE)
        block = attention_steps.kv_bytes_per_block(KV_HEADS, HEAD_DIM, BLOCK_SIZE, cache_dtype)
        self.caches = [torch.zeros(blocks * block, dtype=torch.uint8) for _ in range(LAYERS)]
        self.steps = self._steps()

    def _steps(self):
        b = {name: address(t) for name, t in self.buffers.items()}
        norm = address(self.norm)
        steps = [row_steps.embedding_step(b["h"], address(self.table), vocab_size=VOCAB, hidden_size=HIDDEN,
                                        dtype="bfloat16")]  # fmt: skip
        for (qkv, o, gate_up, down), cache in zip(self.layers, self.caches, strict=True):
            steps += [
                row_steps.rms_norm_step(b["h"], b["n"], norm, width=HIDDEN, eps=1e-5),
                qkv.step(self.buffers["n"], self.buffers["qkv"]),
                attention_steps.rope_append_step(b["qkv"], b["q"], address(cache), address(self.rope), **self.shape),
                attention_steps.paged_attention_step(b["q"], b["a"], address(cache), scale=0.125, **self.shape),
                o.step(self.buffers["a"], self.buffers["h"], accumulate=True),
                row_steps.rms_norm_step(b["h"], b["n"], norm, width=HIDDEN, eps=1e-5),
                gate_up.step(self.buffers["n"], self.buffers["gu"]),
                row_steps.gated_act_step(b["gu"], b["g"], intermediate_size=INTERMEDIATE, activation="silu"),
                down.step(self.buffers["g"], self.buffers["h"], accumulate=True),
            ]
        steps += [
            row_steps.gather_rows_step(b["h"], address(self.logits_in), width=HIDDEN),
            row_steps.rms_norm_step(address(self.logits_in), address(self.logits_in), norm, width=HIDDEN, eps=1e-5,
                                  rows="num_logits"),
            self.head.step(self.logits_in, self.logits, rows="num_logits"),
        ]  # fmt: skip
        return steps


def report_models(pool, formats, bandwidth, flops, seconds):
    print(f"\n{'format':>9} {'MB':>6} {'step':>22} {'ms':>8} {'tok/s':>8} {'of floor':>8}")
    for fmt in formats:
        model = Model(fmt, 128, 8)
        per_token = 2 * LAYERS * sum(i * o for i, o in SHAPES[:4])
        head = 2 * HIDDEN * VOCAB
        for name, lengths, context in (("decode 1, context 64", [1], 64), ("decode 1, context 900", [1], 900),
                                       ("decode 8, context 64", [1] * 8, 64), ("prefill 128", [128], 0)):  # fmt: skip
            inputs = batch_of(lengths, context)
            once = best_time(pool, model.steps, inputs, 2)
            took = best_time(pool, model.steps, inputs, max(5, int(seconds / once)))
            work = per_token * sum(lengths) + head * len(lengths)
            floor = max(model.nbytes / bandwidth, work / flops)
            print(f"{fmt:>9} {model.nbytes / 1e6:>6.0f} {name:>22} {took * 1e3:>8.2f} {sum(lengths) / took:>8.1f} "
                  f"{floor / took:>7.0%}")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--linear", action="store_true")
    parser.add_argument("--model", action="store_true")
    parser.add_argument("--seconds", type=float, default=1.0, help="to spend on each number")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    kernels = library.Library.load(compiler.compile_library(compiler.host_features()))
    print(f"kernels ready in {time.perf_counter() - start:.1f} s for {', '.join(compiler.host_features())}")
    bandwidth, flops = floors(args.threads)
    print(f"{args.threads} threads: {bandwidth / 1e9:.1f} GB/s, {flops / 1e9:.0f} GFLOP/s at most")
    with kernels.pool(args.threads) as pool:
        if args.linear or not args.model:
            report_linears(pool, args.formats, bandwidth, flops, args.seconds)
        if args.model or not args.linear:
            report_models(pool, args.formats, bandwidth, flops, args.seconds)


if __name__ == "__main__":
    main()
