"""Times the kernels for few tokens over tile shapes, on Llama-3.1-8B's linears: python -m benchmarks.h200.linear_sweep

Each candidate runs in a CUDA graph over distinct weights (more than the L2 cache holds), random data; the figure is its
time beside what reading the weights (and their scales) takes at the bandwidth of a copy, and beside cuBLASLt's time
(for int4, with what dequantizing to bf16 takes).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.h200.floors import BANDWIDTH
from benchmarks.h200.graph_time import graph_milliseconds
from trtllm_cli.build.backends.cuda_linears import (
    Form,
    LinearLaunch,
    LinearShape,
    PerWhat,
    dequantized,
    fragment,
    skinny,
    vector,
)
from trtllm_cli.kernels.cuda.compiler import compile_kernels

SHAPES = {
    "qkv": (6144, 4096, ""),
    "dense": (4096, 4096, ""),
    "gate_up": (28672, 4096, "silu"),
    "proj": (4096, 14336, ""),
}
BYTES: dict[Form, float] = {"bf16": 2.0, "fp8": 1.0, "int4": 0.5 + 4 / 128}  # of a weight, with a float32 scale for 128

# Candidates by form and most tokens: tiles as cuda_linears' functions take them. vector (BM, BN, BK, warps, DEPTH);
# fragment (BM, R, U, DEPTH, SPLIT, warps); skinny (BM, BN, BK, SPLIT, stages, warps).
Tiles = list[tuple[int, ...]]
VECTOR: dict[tuple[Form, int], Tiles] = {
    ("bf16", 1): [(1, 2, 2048, 4, 2)],
    ("bf16", 2): [(2, 2, 2048, 4, 2), (2, 4, 1024, 4, 2)],
    ("bf16", 4): [(4, 2, 2048, 4, 2), (4, 4, 1024, 4, 2)],
    ("fp8", 1): [(1, 4, 2048, 4, 2), (1, 2, 2048, 4, 2)],
    ("fp8", 2): [(2, 4, 2048, 4, 2), (2, 2, 2048, 4, 2)],
    ("fp8", 4): [(4, 4, 2048, 4, 1)],
}
FRAGMENT: dict[tuple[Form, int], Tiles] = {
    ("bf16", 8): [(8, 1, 2, 4, 1, 8)],
    ("fp8", 8): [(8, 1, 1, 4, 1, 8), (8, 1, 1, 4, 1, 4)],
    ("int4", 8): [(8, 1, 2, 2, 1, 8), (8, 1, 2, 3, 1, 8), (8, 1, 2, 4, 1, 8), (8, 1, 2, 4, 1, 4), (8, 1, 2, 3, 2, 4)],
    ("int4", 16): [(16, 1, 2, 2, 1, 8), (16, 2, 2, 2, 1, 8), (16, 1, 2, 4, 1, 4)],
    ("int4", 32): [(32, 1, 1, 4, 1, 8), (32, 2, 1, 2, 1, 8)],
}
GATED_FRAGMENT: dict[tuple[Form, int], Tiles] = {
    ("bf16", 8): [(8, 1, 2, 2, 1, 4)],
    ("fp8", 8): [(8, 1, 1, 4, 1, 4), (8, 1, 1, 2, 1, 4)],
    ("int4", 8): [
        (8, 1, 2, 2, 1, 4), (8, 1, 2, 4, 1, 4), (8, 1, 2, 2, 1, 2), (8, 1, 2, 3, 1, 2), (8, 1, 2, 4, 1, 2),
        (8, 1, 2, 2, 1, 8),
    ],
    ("int4", 16): [(16, 1, 2, 2, 1, 4), (16, 1, 2, 2, 1, 2), (16, 1, 1, 2, 1, 4), (16, 2, 1, 2, 1, 4)],
    ("int4", 32): [(32, 1, 1, 2, 1, 4), (32, 2, 1, 1, 1, 4)],
}  # fmt: skip
SKINNY: dict[tuple[Form, int], Tiles] = {
    ("bf16", 16): [(16, 64, 128, 1, 5, 4), (16, 64, 128, 2, 5, 4)],
    ("fp8", 16): [(16, 64, 128, 1, 6, 4), (16, 64, 128, 2, 6, 4)],
    ("bf16", 32): [(32, 64, 128, 2, 4, 4)],
    ("bf16", 64): [(64, 64, 128, 2, 4, 4), (64, 64, 128, 1, 4, 4)],
    ("fp8", 64): [(64, 64, 128, 1, 5, 4)],
}
ACTIVATION = 3.0  # microseconds of a gated activation by itself, for few tokens


def linear_shape(form: Form, name: str) -> LinearShape:
    n, k, gated = SHAPES[name]
    scale: PerWhat = "one" if form == "fp8" else "none"
    return LinearShape(
        form, n, k, group=128 if form == "int4" else 0, w_scale=scale, x_scale=scale, gated=gated,
        x_type="*fp8e4nv" if form == "fp8" else "*bf16",
    )  # fmt: skip


def candidates(form: Form, name: str, tokens: int) -> Iterator[tuple[LinearLaunch, dict[str, Any]]]:
    """Launches with what they are."""
    shape = linear_shape(form, name)
    ways: list[tuple[Callable[..., LinearLaunch], tuple[int, ...]]] = []
    for make, of_form in ((vector, VECTOR), (fragment, GATED_FRAGMENT if shape.gated else FRAGMENT), (skinny, SKINNY)):
        for (f, most), every in of_form.items():
            # the narrowest tiles that hold the tokens; wider ones of other kernels too; int4 may read weights twice
            fits = most // 2 < tokens <= most or (make is skinny and most == 16 and 1 < tokens <= 16)
            twice = form == "int4" and tokens == 2 * most
            if f == form and (fits or twice or (most == 8 and tokens <= 8)):
                ways += [(make, t) for t in every]
    for make, tiles in ways:
        split = 1 if make is vector else tiles[4 if make is fragment else 3]
        if shape.n > 16384 and split > 1:
            continue  # wide enough
        if make is vector and shape.k % tiles[2]:
            continue
        yield make(shape, *tiles), {"kernel": make.__name__, "tiles": tiles}


class Device:
    """Weights, other operands and timing."""

    def __init__(self) -> None:
        import torch

        from trtllm_cli.kernels.cuda.driver import Driver

        self.torch = torch
        torch.zeros(1, device="cuda")
        self.driver, self.stream = Driver.open(), torch.cuda.Stream()
        # random bytes are not random fp8 or bf16 numbers: NaN and infinities among them
        bf16 = torch.empty(1 << 30, device="cuda", dtype=torch.bfloat16).normal_()
        big = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
        self.pools = {"bf16": bf16, "fp8": torch.cat([bf16.to(torch.float8_e4m3fn)] * 2), "int4": big}
        x = torch.randn(64, 14336, device="cuda")
        self.x = {"bf16": x.bfloat16(), "int4": x.bfloat16(), "fp8": x.to(torch.float8_e4m3fn)}
        self.y = torch.empty(64 * 28672, dtype=torch.bfloat16, device="cuda")
        self.one = torch.ones(1 << 16, device="cuda")
        self.plain = torch.empty(28672 * 4096, dtype=torch.bfloat16, device="cuda")
        self.scratch = torch.zeros(1 << 26, dtype=torch.uint8, device="cuda")

    def timed(self, calls: Sequence[Callable[[], object]]) -> float:
        """Microseconds of each of the calls, in a graph."""

        def enqueue() -> None:
            for call in calls:
                call()

        return 1e3 * graph_milliseconds(self.stream, enqueue) / len(calls)

    def weights(self, form: Form, name: str) -> tuple[int, list[int]]:
        """Bytes of a weight with its scales, and where distinct ones are."""
        n, k, _ = SHAPES[name]
        size = int(n * k * BYTES[form])
        return size, [i * size for i in range(min(32, self.pools[form].nbytes // size))]

    def kernel(self, way: LinearLaunch, compiled: Any, form: Form, name: str, tokens: int) -> float:
        """Microseconds."""
        n, k, _ = SHAPES[name]
        loaded = self.driver.load(compiled)
        grid = tuple(-(-tokens // dim[1]) if isinstance(dim, tuple) else dim for dim in way.grid)
        launches = []
        assert way.scratch <= self.scratch.nbytes
        for at in self.weights(form, name)[1]:
            w = self.pools[form].data_ptr() + at
            values = {
                "x": self.x[form].data_ptr(), "w": w, "y": self.y.data_ptr(), "num_tokens": tokens,
                "scratch": self.scratch.data_ptr(), "out": self.plain.data_ptr(),
            }  # fmt: skip
            if form == "int4":
                values["w_scale"] = w + n * k // 2
            args = [values.get(role, self.one.data_ptr()) for role in way.operands]
            launch = loaded.prepare((*grid, 1)[:3], args)
            launch.set_stream(self.stream.cuda_stream)
            launches.append(launch)
        return self.timed([launch.enqueue for launch in launches])

    def library(self, form: Form, name: str, tokens: int, compiled: Any) -> float:
        """Microseconds without our kernel for few tokens: cuBLASLt, for int4 after dequantizing; NaN if it cannot."""
        try:
            us = self.cublas("bf16" if form == "int4" else form, name, tokens)
            if form == "int4":
                way = dequantized(linear_shape(form, name))
                us += self.kernel(way, compiled[way.source], form, name, tokens)
        except RuntimeError as e:
            print(f"{form} {name} x{tokens} cuBLASLt: {e}", file=sys.stderr)
            return math.nan
        return us

    def cublas(self, form: Form, name: str, tokens: int) -> float:
        """Microseconds of torch.mm, for int4 on bf16 weights, or torch._scaled_mm."""
        torch = self.torch
        n, k, _ = SHAPES[name]
        x = self.x[form].flatten()[: tokens * k].view(tokens, k)
        step = 2 if form == "bf16" else 1
        pool = self.pools[form]
        ws = [pool[at // step : at // step + n * k].view(n, k).t() for at in self.weights(form, name)[1]]
        y, one = self.y[: tokens * n].view(tokens, n), self.one[:1]
        if form == "bf16":
            return self.timed([functools.partial(torch.mm, x, w, out=y) for w in ws])
        mm = functools.partial(torch._scaled_mm, scale_a=one[0], scale_b=one[0], out_dtype=torch.bfloat16)
        return self.timed([functools.partial(mm, x, w) for w in ws])


def main() -> None:
    """Compiles, times, prints a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--forms", nargs="*", default=list(BYTES))
    parser.add_argument("--output", default="")
    a = parser.parse_args()
    work = {(f, s, t): list(candidates(f, s, t)) for f in a.forms for s in SHAPES for t in a.tokens}
    every = [way.source for ways in work.values() for way, _ in ways]
    if "int4" in a.forms:
        every += [dequantized(linear_shape("int4", name)).source for name in SHAPES]
    compiled = compile_kernels(every, "sm_90a", lambda i, n: print(f"\r{i}/{n}", end="", file=sys.stderr))
    for source in dict.fromkeys(every):
        if compiled[source].spills:
            print(f"{source.function} spills {compiled[source].spills} bytes: {dict(source.constants)}")
    if a.compile_only:
        return
    device = Device()
    results: list[dict[str, Any]] = []
    table = []
    try:
        for (form, name, tokens), ways in work.items():
            floor = device.weights(form, name)[0] / BANDWIDTH * 1e6
            library = device.library(form, name, tokens, compiled)
            rows = []
            for way, what in ways:
                kernel = compiled[way.source]
                try:
                    us = device.kernel(way, kernel, form, name, tokens)
                except Exception as e:
                    print(f"{form} {name} x{tokens} {what}: {e}", file=sys.stderr)
                    us = math.nan
                rows.append({"us": us, "registers": kernel.registers, "shared": kernel.shared, **what})
            rows.sort(key=lambda row: row["us"] if row["us"] == row["us"] else math.inf)
            about = {"form": form, "shape": name, "tokens": tokens, "floor_us": floor, "cublas_us": library}
            results += [about | row for row in rows]
            table.append(table_line(about, rows))
    finally:
        if a.output:
            with open(a.output, "w") as f:
                json.dump(results, f, indent=1)
    print("\n".join(table))
    for form in a.forms:
        print(form, *chosen([row for row in results if row["form"] == form]), sep="\n    ")


def table_line(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The fastest of a linear's candidates, and some others."""
    start = f"{about['form']:5} {about['shape']:8} x{about['tokens']:<3}"
    if not rows:
        return f"{start} cuBLASLt {about['cublas_us']:6.1f}, no candidate of ours"
    best = rows[0]
    others = "  ".join(f"{row['us']:.1f} {row['kernel'][0]}{row['tiles']}" for row in rows[1:4])
    return (
        f"{start} {best['us']:6.1f} us  {about['floor_us'] / best['us']:.2f} of the floor  "
        f"cuBLASLt {about['cublas_us']:6.1f}  {best['kernel']} {best['tiles']}  | {others}"
    )


def chosen(results: list[dict[str, Any]]) -> Iterator[str]:
    """Rows of cuda_linears' table: the fastest for each count of tokens, up to where cuBLASLt is as fast."""
    for name, (n, k, gated) in SHAPES.items():
        ways: list[tuple[int, str, tuple[int, ...]]] = []
        pending: list[tuple[int, str, tuple[int, ...]]] = []
        for tokens in sorted({row["tokens"] for row in results if row["shape"] == name}):
            rows = [row for row in results if row["shape"] == name and row["tokens"] == tokens]
            best = min(rows, key=lambda row: row["us"] if row["us"] == row["us"] else math.inf)
            library = best["cublas_us"] + (ACTIVATION if gated else 0)
            pending.append((tokens, best["kernel"], tuple(best["tiles"])))
            if not best["us"] > library / 1.03:
                ways, pending = ways + pending, []
            elif best["us"] > 1.03 * library:
                break  # nor does what wins for more tokens make up for it
        merged = [way for way, after in zip(ways, [*ways[1:], (0,)], strict=True) if way[1:] != after[1:]]
        yield f"({n // 2 if gated else n}, {k}, {bool(gated)}): {merged},"


if __name__ == "__main__":
    main()
