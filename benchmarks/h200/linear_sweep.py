"""Times the kernels for few tokens over their candidates, on Llama-3.1-8B's linears:
python -m benchmarks.h200.linear_sweep

As a build times them (trtllm_cli/build/backends/cuda_timing.py); the figure is a candidate's time beside what reading
the weights (and their scales) takes at the bandwidth of a copy, and beside cuBLASLt's time (for int4, with what
dequantizing to bf16 takes). --compile-only fills the cache of compiled kernels on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.h200.floors import BANDWIDTH
from trtllm_cli.build.backends.cuda_candidates import TOKENS, candidates
from trtllm_cli.build.backends.cuda_linears import Form, PerWhat, launch_of, packed_tensors
from trtllm_cli.build.backends.cuda_tactics import fastest
from trtllm_cli.build.backends.cuda_timing import Compiled, compile_work, find_timer, missing, time_work
from trtllm_cli.build.timing_cache import TimedShape, TokenTimes
from trtllm_cli.errors import DeviceError

ARCH = "sm_90a"
FORMS: tuple[Form, ...] = ("bf16", "fp8", "int4")  # int4 in groups of 128, without zeros
SHAPES = {
    "qkv": (6144, 4096, ""),
    "dense": (4096, 4096, ""),
    "gate_up": (28672, 4096, "silu"),
    "proj": (4096, 14336, ""),
}


def timed_shape(form: Form, name: str) -> TimedShape:
    n, k, gated = SHAPES[name]
    scale: PerWhat = "one" if form == "fp8" else "none"
    return TimedShape(
        form=form, n=n, k=k, group=128 if form == "int4" else 0, has_zero=False, w_scale=scale, x_scale=scale,
        gated=gated,
    )  # fmt: skip


def main() -> None:
    """Compiles, times, prints a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--forms", nargs="*", default=FORMS)
    parser.add_argument("--output", default="")
    a = parser.parse_args()
    names = {timed_shape(form, name): name for form in a.forms for name in SHAPES}
    work = [each for shape in names for each in missing(shape, {}, ARCH, a.tokens)]
    compiled = compile_work(work, ARCH, lambda i, n: print(f"\r{i}/{n}", end="", file=sys.stderr))
    for source, kernel in compiled.items():
        if kernel.spills:
            print(f"{source.function} spills {kernel.spills} bytes: {dict(source.constants)}")
    if a.compile_only:
        return
    timer = find_timer(ARCH)
    if timer is None:
        raise DeviceError(f"there is no GPU for {ARCH} here")
    results: list[dict[str, Any]] = []
    table: list[str] = []
    times: dict[TimedShape, dict[int, TokenTimes]] = {shape: {} for shape in names}
    try:
        for each, measured in time_work(timer, work, compiled):
            times[each.shape][each.tokens] = measured
            rows = rows_of(each.shape, names[each.shape], measured, compiled)
            results += rows
            table.append(table_line(each.shape, names[each.shape], measured, rows))
    finally:
        if a.output:
            with open(a.output, "w") as f:
                json.dump(results, f, indent=1)
    print("\n".join(table))
    for form in a.forms:
        print(form, *chosen({shape: by for shape, by in times.items() if shape.form == form}), sep="\n    ")


def floor_us(shape: TimedShape) -> float:
    """What reading the weights takes."""
    return sum(tensor.nbytes for tensor in packed_tensors(shape.linear).values()) / BANDWIDTH * 1e6


def rows_of(shape: TimedShape, name: str, times: TokenTimes, compiled: Compiled) -> list[dict[str, Any]]:
    """The candidates with their times, the fastest first; NaN: it does not run."""
    rows = []
    for tactic in candidates(shape.linear, times.tokens):
        kernel, us = compiled[launch_of(shape.linear, tactic).source], number(times.tactics[str(tactic)])
        about = {"form": shape.form, "shape": name, "tokens": times.tokens, "floor_us": floor_us(shape)}
        takes = {"cublas_us": number(times.cublas_us), "us": us, "registers": kernel.registers, "shared": kernel.shared}
        rows.append({**about, **takes, "kernel": tactic.kernel, "tiles": tactic.tiles})
    return sorted(rows, key=lambda row: math.inf if math.isnan(row["us"]) else row["us"])


def number(us: float | None) -> float:
    return math.nan if us is None else us


def table_line(shape: TimedShape, name: str, times: TokenTimes, rows: list[dict[str, Any]]) -> str:
    """The fastest of a linear's candidates, and some others."""
    start = f"{shape.form:5} {name:8} x{times.tokens:<3}"
    library = number(times.cublas_us)
    if not rows:
        return f"{start} cuBLASLt {library:6.1f}, no candidate of ours"
    best = rows[0]
    others = "  ".join(f"{row['us']:.1f} {row['kernel'][0]}{row['tiles']}" for row in rows[1:4])
    return (
        f"{start} {best['us']:6.1f} us  {best['floor_us'] / best['us']:.2f} of the floor  "
        f"cuBLASLt {library:6.1f}  {best['kernel']} {best['tiles']}  | {others}"
    )


def chosen(times: dict[TimedShape, dict[int, TokenTimes]]) -> Iterator[str]:
    """Rows of cuda_linears' table of what ships."""
    for shape, by_tokens in times.items():
        ways = [(most, tactic.kernel, tactic.tiles) for most, tactic in fastest(shape.linear, by_tokens)]
        yield f"({shape.n // 2 if shape.gated else shape.n}, {shape.k}, {bool(shape.gated)}): {ways},"


if __name__ == "__main__":
    main()
