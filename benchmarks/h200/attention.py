"""Times the attention kernels over tile shapes, on Llama-3.1-8B's heads: python -m benchmarks.h200.attention

Decode: one new token a sequence over paged caches, as a share of the floor: reading the cache at the bandwidth of a
copy (floors.BANDWIDTH). Prefill: causal, one prompt alone, in TFLOP/s beside 75% of the 989 on paper. Every candidate
runs in a CUDA graph, the launches one after the other over distinct caches (as many as the L2 cache does not hold), on
random data and with blocks in random order; each is compared with torch in float32 first, and a wrong one is no
candidate. --compile-only fills the cache of compiled kernels ($XDG_CACHE_HOME) on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import say, table
from benchmarks.h200 import floors
from benchmarks.h200.machine import machine
from trtllm_cli.build.backends.cuda_attention import ROPE_POINTERS
from trtllm_cli.errors import TrtllmError
from trtllm_cli.kernels.cuda.compiler import compile_kernels
from trtllm_cli.kernels.cuda.graph_time import graph_milliseconds
from trtllm_cli.kernels.cuda.kernel import CompiledKernel, KernelSource

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
GROUP = HEADS // KV_HEADS
SMS = 132
SPLITS = (1, 2, 4, 8, 16, 32, 64)
SHARED_LIMIT = 227 * 1024  # bytes of a program on sm_90
L2_BYTES = 50 << 20
ROTATE_BYTES = 8 * L2_BYTES
MOST_LAYERS = 512  # launches in a graph
PREFILL_GOAL = 0.75 * floors.PEAK_BF16
TYPES = {"bf16": "*bf16", "fp8": "*fp8e4nv"}
POINTERS = (
    "q", "k_cache", "v_cache", "block_tables", "query_start", "seq_lens", "sinks", "kv_scale", "out_scale", "out"
)  # fmt: skip
_PROMPTS = {
    "first_prompt_ptr": "*i32", "num_prompts": "i32", "num_seqs": "i32", "k_new_ptr": "*bf16", "v_new_ptr": "*bf16"
}  # fmt: skip
LAUNCHES = {"decode": 8, "prefill": 4}  # in a graph, at least
KEPT = 8  # of a case's candidates, the fastest
_KINDS = {"block_tables": "*i32", "query_start": "*i32", "seq_lens": "*i32", "kv_scale": "*fp32", "out_scale": "*fp32"}


def _args(kv: str) -> dict[str, str]:
    args = {f"{name}_ptr": _KINDS.get(name, "*bf16") for name in POINTERS}
    args |= {"k_cache_ptr": TYPES[kv], "v_cache_ptr": TYPES[kv]}
    return args | {"max_blocks": "i32", "scale": "fp32", "softcap": "fp32"}


def _constants(kv: str, block_size: int) -> dict[str, Any]:
    return {
        "NUM_KV_HEADS": KV_HEADS, "GROUP": GROUP, "HEAD_DIM": HEAD_DIM, "V_HEAD_DIM": HEAD_DIM, "WINDOW": 0,
        "BLOCK_SIZE": block_size, "SOFTCAP": False, "SINKS": False, "KV_QUANT": kv == "fp8", "PDL": True,
    }  # fmt: skip


def decode_source(kv: str, block_size: int, warps: int, stages: int, block_n: int, splits: int) -> KernelSource:
    args = _args(kv) | {"row_seqs_ptr": "*i32", "partial_ptr": "*i64", "lse_ptr": "*i64", "step_ptr": "*i32"}
    args |= {"calls": "i32", "call": "i32"}
    return KernelSource.of(
        "decode_attention", "decode_attention", args, num_warps=warps, num_stages=stages, BLOCK_G=16, BLOCK_N=block_n,
        NUM_SPLITS=splits, OF_ROWS=False, PUSH=True, PULL=True, **_constants(kv, block_size),
    )  # fmt: skip


def ahead_source(kv: str, block_size: int, warps: int, stages: int, block_n: int) -> KernelSource:
    args = _args(kv) | {"partial_ptr": "*i64", "lse_ptr": "*i64", "step_ptr": "*i32", "calls": "i32", "call": "i32"}
    args |= ROPE_POINTERS | {"eps": "fp32"}
    constants = _constants(kv, block_size)
    del constants["V_HEAD_DIM"]
    return KernelSource.of(
        "cache_attention", "cache_attention", args, num_warps=warps, BLOCK_G=8, BLOCK_N=block_n, STAGES=stages,
        NUM_SPLITS=1, SHARE=0, ROPE=False, NORM=False, PUSH=True, PULL=True, **constants,
    )  # fmt: skip


def prefill_source(
    kv: str, block_size: int, context: int, rows: int, warps: int, stages: int, block_n: int
) -> KernelSource:
    """Of an FP8 cache the prompt's keys and values have been widened, as engines do it."""
    args = _args(kv) | _PROMPTS
    return KernelSource.of(
        "prefill_attention", "prefill_attention", args, num_warps=warps, num_stages=stages,
        NEW_STRIDE=_stride(context) if kv == "fp8" else 0,
        SKIP_DECODES=True, PACK=GROUP, BLOCK_Q=rows // GROUP, BLOCK_N=block_n, **_constants(kv, block_size),
    )  # fmt: skip


def prompt_source(kv: str, block_size: int, context: int, registers: int, stages: int, block_n: int) -> KernelSource:
    args = _args(kv) | _PROMPTS
    constants = _constants(kv, block_size)
    del constants["V_HEAD_DIM"]
    return KernelSource.of(
        "prompt_attention", "prompt_attention", args, NEW_STRIDE=_stride(context) if kv == "fp8" else 0, PACK=GROUP,
        BLOCK_N=block_n, STAGES=stages, REGISTERS=registers, **constants,
    )  # fmt: skip


def splits_for(batch: int, context: int) -> list[int]:
    """From about one program for two multiprocessors to sixteen a multiprocessor, and no more than there are tiles."""
    programs = batch * KV_HEADS
    fitting = [s for s in SPLITS if SMS / 2 <= programs * s <= 16 * SMS and s <= max(1, context // 64)]
    if fitting:
        return fitting
    return [1] if programs > 16 * SMS else [max(s for s in SPLITS if s <= max(1, context // 64))]


def decode_candidates(kv: str, block_size: int, batch: int, context: int) -> list[KernelSource]:
    more = (1, 2, 32), (1, 3, 32), (1, 2, 64), (1, 3, 64), (4, 3, 128), (8, 3, 128)
    tiles = itertools.chain(itertools.product((2, 4), (2, 3, 4), (32, 64)), more)
    bytes_of_tiles = (1, 3, 8192), (2, 2, 16384), (2, 3, 16384), (4, 3, 32768), (4, 4, 32768)
    return [
        *(
            decode_source(kv, block_size, warps, stages, block_n, splits)
            for (warps, stages, block_n), splits in itertools.product(tiles, splits_for(batch, context))
        ),
        *(
            ahead_source(kv, block_size, warps, stages, nbytes // decode_bytes(kv, 1, 1) * KV_HEADS)
            for warps, stages, nbytes in bytes_of_tiles
        ),
    ]


def _stride(context: int) -> int:
    return context + 128  # rows of a head: the widest tile more than tokens


def prefill_candidates(kv: str, block_size: int, context: int) -> list[KernelSource]:
    tiles = [(128, 8, stages, block_n) for stages in (2, 3) for block_n in (64, 128)]
    tiles += [(64, 4, stages, block_n) for stages in (2, 3) for block_n in (64, 128)]
    tiles += [(256, 16, stages, block_n) for stages in (2, 3) for block_n in (64, 128)]
    tiles += [(256, 8, 2, 32), (256, 8, 2, 64), (128, 4, 2, 64), (64, 4, 2, 32)]
    specialized = [(232, 2, 128), (224, 2, 128), (240, 2, 128), (208, 3, 64)]
    return [
        *(prefill_source(kv, block_size, context, *tile) for tile in tiles),
        *(prompt_source(kv, block_size, context, *tile) for tile in specialized),
    ]


def name_of(source: KernelSource) -> dict[str, Any]:
    """What tells a candidate from the others."""
    c = dict(source.constants)
    what = {"warps": source.num_warps, "stages": source.num_stages, "BLOCK_N": c["BLOCK_N"]}
    if "SHARE" in c:
        return what | {"STAGES": c["STAGES"]}
    if "NUM_SPLITS" in c:
        return what | {"NUM_SPLITS": c["NUM_SPLITS"]}
    if "REGISTERS" in c:
        return what | {"STAGES": c["STAGES"], "REGISTERS": c["REGISTERS"]}
    return what | {"BLOCK_Q": c["BLOCK_Q"], "PACK": c["PACK"]}


def decode_bytes(kv: str, batch: int, context: int) -> int:
    """Of one layer's cache."""
    return batch * context * KV_HEADS * HEAD_DIM * 2 * (2 if kv == "bf16" else 1)


def prefill_flops(length: int) -> float:
    """Causal: the scores that are seen, and their sums over values."""
    return 4 * HEADS * HEAD_DIM * length * (length + 1) / 2


def compile_all(sources: list[KernelSource]) -> dict[KernelSource, CompiledKernel]:
    """Those that compile and fit; of the others it says why not."""
    try:
        made = compile_kernels(sources, "sm_90a", lambda i, n: print(f"\r{i}/{n} ", end="", file=sys.stderr))
    except TrtllmError:
        made = {}
        for source in dict.fromkeys(sources):
            try:
                made |= compile_kernels([source], "sm_90a")
            except TrtllmError as e:
                say(f"left out: {source.function} {name_of(source)}: {e}")
    for source, kernel in list(made.items()):
        if kernel.shared > SHARED_LIMIT:
            say(f"left out: {source.function} {name_of(source)}: {kernel.shared} bytes of shared memory")
            del made[source]
    return made


@dataclass
class Case:
    """A grid point."""

    kind: str  # "decode" or "prefill"
    kv: str
    batch: int
    context: int

    @property
    def label(self) -> str:
        if self.kind == "prefill":
            return f"prefill of {self.context}, {self.kv} cache"
        return f"decode x{self.batch} at {self.context}, {self.kv} cache"


class Bench:
    """The device, and pools of random numbers that caches are cut from."""

    def __init__(self, cases: list[Case], block_size: int) -> None:
        import torch

        from trtllm_cli.kernels.cuda.driver import Driver

        self.torch, self.block_size = torch, block_size
        torch.cuda.init()
        torch.zeros(1, device="cuda")
        self.driver, self.stream = Driver.open(), torch.cuda.Stream()
        self.bandwidth = floors.BANDWIDTH
        self.pools: dict[str, Any] = {}
        for kv in sorted({case.kv for case in cases}):
            most = max(self._layer_bytes(case) for case in cases if case.kv == kv)
            self.pools[kv] = self._random(kv, max(most, ROTATE_BYTES))
        self.one = torch.ones(64, device="cuda")

    def _random(self, kv: str, nbytes: int) -> Any:
        torch = self.torch
        dtype = torch.bfloat16 if kv == "bf16" else torch.float8_e4m3fn
        out = torch.empty(nbytes // dtype.itemsize, dtype=dtype, device="cuda")
        for part in out.split(1 << 27):
            part.copy_(torch.randn(len(part), device="cuda", dtype=torch.bfloat16).to(dtype))
        return out

    def _layer_bytes(self, case: Case) -> int:
        padded = -(-case.context // self.block_size) * self.block_size
        return decode_bytes(case.kv, case.batch, padded)

    def run(
        self, case: Case, compiled: dict[KernelSource, CompiledKernel], sources: list[KernelSource]
    ) -> list[dict[str, Any]]:
        """Every candidate of a case, the fastest first."""
        torch, size = self.torch, self.block_size
        length = case.context if case.kind == "prefill" else 1
        tokens = case.batch * length
        blocks = -(-case.context // size)
        count = case.batch * blocks
        generator = torch.Generator(device="cuda").manual_seed(0)
        tables = torch.randperm(count, device="cuda", generator=generator).int().view(case.batch, blocks)
        lens = torch.full((case.batch,), case.context, dtype=torch.int32, device="cuda")
        starts = torch.arange(case.batch + 1, dtype=torch.int32, device="cuda") * length
        q = torch.randn(tokens, HEADS * HEAD_DIM, device="cuda", generator=generator).bfloat16()
        out = torch.empty_like(q)
        half = count * KV_HEADS * size * HEAD_DIM
        pool = self.pools[case.kv]
        layers = min(len(pool) // (2 * half), MOST_LAYERS, -(-ROTATE_BYTES // self._layer_bytes(case)))
        caches = [
            pool[i * 2 * half : (i + 1) * 2 * half].view(2, count, KV_HEADS, size, HEAD_DIM) for i in range(layers)
        ]
        most = max((dict(s.constants).get("NUM_SPLITS", 1) for s in sources), default=1)
        decoding = case.kind == "decode"
        new = (self.one, self.one)
        if not decoding and case.kv == "fp8":
            new = self._widened(caches[0], tables[0], case.context)
        rows = case.batch * HEADS * most if decoding else 1
        partial = torch.zeros(rows * HEAD_DIM, dtype=torch.int64, device="cuda")
        lse, step = torch.zeros(rows, dtype=torch.int64, device="cuda"), torch.ones(1, dtype=torch.int32, device="cuda")
        at: dict[str, Any] = {
            "q_ptr": q, "block_tables_ptr": tables, "query_start_ptr": starts, "seq_lens_ptr": lens,
            "sinks_ptr": self.one, "kv_scale_ptr": self.one, "out_scale_ptr": self.one, "out_ptr": out,
            "partial_ptr": partial, "lse_ptr": lse, "step_ptr": step, "k_new_ptr": new[0], "v_new_ptr": new[1],
            "first_prompt_ptr": starts[:1],
        }  # fmt: skip
        values = {name: tensor.data_ptr() for name, tensor in at.items()}
        values |= dict.fromkeys((*ROPE_POINTERS, "eps"), 0)
        values |= {
            "row_seqs_ptr": 0,
            "max_blocks": blocks,
            "scale": HEAD_DIM**-0.5,
            "softcap": 0.0,
            "num_seqs": case.batch,
            "num_prompts": case.batch,
            "calls": MOST_LAYERS,
        }
        checked = sorted({0, case.batch - 1})
        expected = [self._expected(q, caches[0], tables, s, length, case.context) for s in checked]
        found = []
        for source in sources:
            if source not in compiled:
                continue
            c, kernel = dict(source.constants), compiled[source]
            if decoding:
                grid = (1, KV_HEADS, case.batch) if "SHARE" in c else (c["NUM_SPLITS"], case.batch, KV_HEADS)
            else:
                grid = (HEADS // c["PACK"], tokens // c.get("BLOCK_Q", 128 // c["PACK"]) + case.batch, 1)
            loaded = self.driver.load(kernel)
            launches = []
            for call in range(len(caches) * max(1, LAUNCHES[case.kind] // len(caches))):
                cache = caches[call % len(caches)]
                values |= {"k_cache_ptr": cache[0].data_ptr(), "v_cache_ptr": cache[1].data_ptr(), "call": call}
                launches.append(loaded.prepare(grid, [values[name] for name in kernel.names]))
            out.fill_(math.nan)
            for scratch in (partial, lse):
                scratch.zero_()
            torch.cuda.synchronize()
            with torch.cuda.stream(self.stream):
                self._enqueue(launches[:1], step)
            torch.cuda.synchronize()
            row = {**name_of(source), "registers": kernel.registers, "spills": kernel.spills, "shared": kernel.shared}
            errors = [self._error(out, s, length, want) for s, want in zip(checked, expected, strict=True)]
            if not max(errors) < 0.03:  # NaN too
                say(f"WRONG: {case.label} {row}: relative error {max(errors):.3g}")
                continue
            enqueue = functools.partial(self._enqueue, launches, step)
            ms = graph_milliseconds(self.stream, enqueue) / len(launches)
            found.append(
                {"kind": case.kind, "kv": case.kv, "batch": case.batch, "context": case.context, **row, "us": ms * 1e3}
            )
            if decoding:
                found[-1]["of_floor"] = decode_bytes(case.kv, case.batch, case.context) / self.bandwidth * 1e3 / ms
            else:
                found[-1]["tflops"] = prefill_flops(case.context) / ms / 1e9
                found[-1]["of_goal"] = found[-1]["tflops"] * 1e12 / PREFILL_GOAL
        return sorted(found, key=lambda r: r["us"])

    def _enqueue(self, launches: list[Any], step: Any) -> None:
        step.add_(1)
        for launch in launches:
            launch.set_stream(self.stream.cuda_stream)
            launch.enqueue()

    def _widened(self, cache: Any, table: Any, context: int) -> tuple[Any, Any]:
        """Keys and values of a sequence in bfloat16 [KV_HEADS, _stride(context), HEAD_DIM]."""
        rows = cache[:, table.long()].to(self.torch.bfloat16).transpose(1, 2).reshape(2, KV_HEADS, -1, HEAD_DIM)
        k, v = self.torch.nn.functional.pad(rows[:, :, :context], (0, 0, 0, _stride(context) - context))
        return k, v

    def _expected(self, q: Any, cache: Any, tables: Any, seq: int, new: int, length: int) -> Any:
        """The last query's output [HEADS, HEAD_DIM], which sees all of its sequence's cache."""
        k, v = (
            part[tables[seq].long()].float().transpose(0, 1).reshape(KV_HEADS, -1, HEAD_DIM)[:, :length]
            for part in cache
        )
        rows = q[(seq + 1) * new - 1].float().view(KV_HEADS, GROUP, HEAD_DIM)
        weights = (rows @ k.transpose(1, 2) * HEAD_DIM**-0.5).softmax(-1)
        return (weights @ v).view(HEADS, HEAD_DIM)

    def _error(self, out: Any, seq: int, new: int, expected: Any) -> float:
        found = out[(seq + 1) * new - 1].float().view(HEADS, HEAD_DIM)
        return ((found - expected).norm() / expected.norm()).item()


def cases_of(a: argparse.Namespace) -> list[Case]:
    cases = []
    for kv in a.kv:
        for batch, context in itertools.product(a.batches, a.contexts):
            if batch * context <= a.most_tokens:
                cases.append(Case("decode", kv, batch, context))
        cases += [Case("prefill", kv, 1, length) for length in a.prefills]
    return cases


def sources_of(case: Case, block_size: int) -> list[KernelSource]:
    if case.kind == "prefill":
        return prefill_candidates(case.kv, block_size, case.context)
    return decode_candidates(case.kv, block_size, case.batch, case.context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--kv", nargs="*", choices=TYPES, default=list(TYPES))
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 64, 256, 1024])
    parser.add_argument("--contexts", type=int, nargs="*", default=[128, 1024, 2048, 8192, 32768])
    parser.add_argument("--prefills", type=int, nargs="*", default=[2048, 8192, 16384])
    parser.add_argument("--most-tokens", type=int, default=1 << 21, help="in a cache: grid points above are left out")
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--output", default="")
    a = parser.parse_args()
    cases = cases_of(a)
    work = [(case, sources_of(case, a.block_size)) for case in cases]
    compiled = compile_all([source for _, sources in work for source in sources])
    if a.compile_only:
        say(f"{len(compiled)} kernels")
        return
    bench, where = Bench(cases, a.block_size), machine()
    results: list[dict[str, Any]] = []
    best = []
    for case, sources in work:
        rows = bench.run(case, compiled, sources)
        results += rows[:KEPT]
        for row in rows[:1]:
            best.append(row)
            share = f"{row['of_floor']:.2f} of the floor" if case.kind == "decode" else f"{row['tflops']:.0f} TFLOP/s"
            say(f"{case.label}: {row['us']:.1f} us, {share}")
        if a.output:  # after each case: an interrupted run has told something
            Path(a.output).parent.mkdir(parents=True, exist_ok=True)
            data = {
                "script": "attention",
                "machine": where,
                "copy_bytes_s": bench.bandwidth,
                "rows": [],
                "best": best,
            }
            Path(a.output).write_text(json.dumps({**data, "candidates": results}, indent=1) + "\n")
    say("\n" + best_table(best))


def best_table(best: list[dict[str, Any]]) -> str:
    """The fastest of each case."""
    rows = []
    for row in best:
        what = [
            f"{key} {row[key]}"
            for key in ("warps", "stages", "BLOCK_N", "NUM_SPLITS", "BLOCK_Q", "PACK", "STAGES", "REGISTERS")
            if key in row
        ]
        if row["kind"] == "decode":
            reached = [f"{row['of_floor']:.2f} of the floor", ""]
        else:
            reached = [f"{row['tflops']:.0f} TFLOP/s", f"{row['of_goal']:.2f}"]
        rows.append(
            [row["kind"], row["kv"], row["batch"], row["context"], f"{row['us']:.1f}", *reached, ", ".join(what)]
        )
    return table(["kernel", "KV", "batch", "context", "us", "reached", "of 75% of peak", "tiles"], rows)


if __name__ == "__main__":
    main()
