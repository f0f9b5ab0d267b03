"""Times steps of an engine by themselves: python -m benchmarks.h200.steps --shape 8b --format bf16

Decode steps of several batch sizes and contexts, each enqueued one step ahead as the executor does it, and prefills of
whole prompts. Printed beside the floor: the bytes that a step must read over the bandwidth at which a copy runs.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from benchmarks.h200.floors import BANDWIDTH
from benchmarks.h200.synthetic import FORMATS, SHAPES, decode_inputs, greedy, plan_of, prefill_inputs, runner_of


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--format", choices=FORMATS, default="bf16")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prefills", type=int, nargs="*", default=[128, 2048])
    parser.add_argument("--kv", default=None)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--max-batch-size", type=int, default=1024)
    parser.add_argument("--max-num-tokens", type=int, default=8192)
    parser.add_argument("--max-seq-len", type=int, default=4096)
    parser.add_argument("--output", default="")
    parser.add_argument("--without", nargs="*", default=[], help="ops to leave out (wrong numbers, but what they cost)")
    a = parser.parse_args()
    options = {
        "max_batch_size": a.max_batch_size, "max_num_tokens": a.max_num_tokens, "max_seq_len": a.max_seq_len,
        "kv_cache_dtype": a.kv,
    }  # fmt: skip
    if a.compile_only:
        lowered, _ = plan_of(a.shape, a.format, layers=a.layers, **options)
        print(len(lowered.plan["kernels"]), "kernels;", f"{lowered.memory.weights / 1e9:.2f} GB of weights")
        return
    started = time.perf_counter()
    blocks = max(max(a.batches, default=1) * (a.context // 64 + 4), 256)
    runner, config = runner_of(a.shape, a.format, num_blocks=blocks, layers=a.layers, **options)
    runner._steps = [s for s in runner._steps if s["op"] not in a.without]
    print(f"loaded in {time.perf_counter() - started:.1f} s")
    weights = len(runner._weights._data) - 128256 * SHAPES[a.shape]["hidden_size"] * 2  # a step reads few embeddings
    if SHAPES[a.shape].get("share_embedding_table"):
        weights += 128256 * SHAPES[a.shape]["hidden_size"] * 2
    results = []
    for batch in a.batches:
        kv = batch * a.context * runner.bytes_per_block / config.tokens_per_block
        ms, host_ms, bad = decode_milliseconds(runner, config, batch, a.context, a.steps)
        floor = (weights + kv) / BANDWIDTH * 1e3
        row = {
            "kind": "decode",
            "batch": batch,
            "context": a.context,
            "ms": ms,
            "floor_ms": floor,
            "host_ms": host_ms,
            "bad": bad,
        }
        results.append(row)
        print(
            f"{a.shape} {a.format} decode x{batch} at {a.context}: {ms:.3f} ms, floor {floor:.3f} ({floor / ms:.2f}), "
            f"{batch / ms * 1e3:.0f} tok/s, enqueued in {row['host_ms']:.3f} ms{' NOT FINITE' if row['bad'] else ''} "
            f"{'without ' + ' '.join(a.without) if a.without else ''}"
        )
    for length in a.prefills:
        ms, host, times = prefill_milliseconds(runner, config, length)
        results.append({"kind": "prefill", "tokens": length, "ms": ms, "host_ms": host})
        print(
            f"{a.shape} {a.format} prefill of {length}: {ms:.2f} ms, enqueued in {host:.2f} ms; "
            f"all: {' '.join(f'{t:.1f}' for t in times)}"
        )
    if a.profile:
        _profile(runner, config, a.batches[0], a.context, a.prefills)
    if a.output:
        with open(a.output, "w") as f:
            json.dump(results, f, indent=1)


def decode_milliseconds(runner, config, batch: int, context: int, steps: int) -> tuple[float, float, int]:
    """Of a step, one ahead, and of its host part; how many tokens of the last were not finite."""
    inputs, ahead = decode_inputs(config, batch, context), decode_inputs(config, batch, context, known=False)
    sampling = greedy(batch)
    pending = runner.start(inputs, sampling)
    for _ in range(4):
        following = runner.start(ahead, sampling)
        pending.tokens()
        pending = following
    torch.cuda.synchronize()
    begun = time.perf_counter()
    host = 0.0
    for _ in range(steps):
        t = time.perf_counter()
        following = runner.start(ahead, sampling)
        host += time.perf_counter() - t
        pending.tokens()
        pending = following
    tokens = pending.tokens()
    return (time.perf_counter() - begun) / steps * 1e3, host / steps * 1e3, int((tokens < 0).sum())


def prefill_milliseconds(runner, config, length: int) -> tuple[float, float, list[float]]:
    """Of prompts of `length` tokens in all, and of the host's part: medians; every run's."""
    longest = min(length, config.max_seq_len)  # more tokens are several prompts
    inputs = prefill_inputs(config, [longest] * (length // longest))
    sampling = greedy(inputs.num_seqs)
    times, enqueues = [], []
    for _ in range(8):
        t = time.perf_counter()
        pending = runner.start(inputs, sampling)
        enqueues.append((time.perf_counter() - t) * 1e3)
        pending.tokens()
        times.append((time.perf_counter() - t) * 1e3)
    return sorted(times)[4], sorted(enqueues)[4], times


_SHOWN = 14  # kernels one after another: more than a layer


def _profile(runner, config, batch: int, context: int, prefills: list[int]) -> None:
    """Where a step's time goes, by kernel."""
    from torch.profiler import ProfilerActivity, profile

    cases = [
        ("decode", decode_inputs(config, batch, context), batch),
        *(("prefill", prefill_inputs(config, [min(n, 128)] * (n // min(n, 128))), n // min(n, 128)) for n in prefills),
    ]
    for kind, inputs, count in cases:
        with profile(activities=[ProfilerActivity.CUDA]) as traced:
            runner.start(inputs, greedy(count)).tokens()
        rows = [(e.key[:48], e.count, e.self_device_time_total) for e in traced.key_averages()]
        rows.sort(key=lambda r: -r[2])
        print(f"{kind} x{inputs.num_tokens}: {sum(r[2] for r in rows) / 1e3:.3f} ms in kernels")
        for name, n, us in rows[:12]:
            print(f"   {us / 1e3:8.3f} ms  {n:4d} x {us / n:8.2f} us  {name}")
        kernels = sorted((e.time_range.start, e.time_range.end, e.name) for e in traced.events())
        middle = kernels[len(kernels) // 2 :][:_SHOWN]
        for start, end, name in middle:
            print(f"   from {start - middle[0][0]:8.2f} to {end - middle[0][0]:8.2f} us  {name[:48]}")


if __name__ == "__main__":
    main()
