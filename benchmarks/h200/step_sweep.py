"""Tactics of linears for few tokens, chosen by whole decode steps: python -m benchmarks.h200.step_sweep --format fp8

What is the fastest by itself (linear_sweep.py) is often not in a step, where the next kernel's weights want to be on
their way. So each linear's candidates are tried one after another, all others as they were, and what makes the step
shorter stays; --passes times over all linears. Prints rows of cuda_linears' table. --compile-only takes no GPU.

With several GPUs, steps of ranks that share the model, whose linears are halves: mpirun -n 2 python -m ... --tp 2
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from benchmarks.h200.machine import machine
from benchmarks.h200.steps import decode_milliseconds
from benchmarks.h200.synthetic import FORMATS, SHAPES, linears_of, plan_of, runner_of
from trtllm_cli.build.backends.cuda_candidates import candidates
from trtllm_cli.build.backends.cuda_linears import KERNELS, LinearShape, Tactic, fitted, shipped_tactics
from trtllm_cli.build.backends.cuda_tactics import LinearTactics
from trtllm_cli.run.communicator import Activity, Communicator, SingleRank
from trtllm_cli.run.mpi import MpiCommunicator

ARCH = "sm_90a"
Chosen = dict[LinearShape, Tactic]
_SHORTER = 1e-3  # milliseconds: what makes less of a difference is not taken


@dataclass
class Tried(LinearTactics):
    """What ships, but for up to `tokens`, for which it is `taken`; nothing is left to a first load."""

    tokens: int = 1
    taken: Mapping[LinearShape, Tactic] = field(default_factory=dict)
    fixed: bool = True

    def ways(self, shape: LinearShape) -> list[tuple[int, Tactic]]:
        ways = super().ways(shape)
        if shape in self.taken:
            first = fitted(shape, self.taken[shape], self.arch)
            ways = [(self.tokens, first), *(way for way in ways if way[0] > self.tokens)]
        return ways


def descend(
    starts: Mapping[LinearShape, Tactic], options: Mapping[LinearShape, list[Tactic]],
    milliseconds: Callable[[Chosen], float], passes: int = 2,
) -> tuple[Chosen, float]:  # fmt: skip
    """From `starts`, one linear after another, what makes the step shorter; what came out, and the step's time."""
    taken = dict(starts)
    best = milliseconds(taken)
    for _ in range(passes):
        for shape, others in options.items():
            for tactic in others:
                if tactic == taken.get(shape):
                    continue
                ms = milliseconds({**taken, shape: tactic})
                if ms < best - _SHORTER:
                    taken, best = {**taken, shape: tactic}, ms
    return taken, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--format", choices=FORMATS, default="bf16")
    parser.add_argument("--tokens", type=int, default=1, help="sequences of the step")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--kv", default=None, help="dtype of the cache")
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--tp", type=int, default=1, help="ranks")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS), help="whose tiles are tried")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--output", default="", help="JSON")
    a = parser.parse_args()
    limits = {
        "max_batch_size": max(8, a.tokens), "max_num_tokens": 512, "max_seq_len": 2 * a.context, "kv_cache_dtype": a.kv,
    }  # fmt: skip
    shapes = linears_of(a.shape, a.format, tp=a.tp, **limits)
    options = {shape: [c for c in candidates(shape, a.tokens, ARCH) if c.kernel in a.kernels] for shape in shapes}
    starts = {shape: taken for shape in shapes if (taken := first_way(shape, a.tokens)) is not None}

    def tried(taken: Mapping[LinearShape, Tactic]) -> Tried:
        return Tried(ARCH, tokens=a.tokens, taken=taken)

    if a.compile_only:
        for i in range(max(map(len, options.values()))):
            some = {shape: others[min(i, len(others) - 1)] for shape, others in options.items() if others}
            plan_of(a.shape, a.format, layers=a.layers, tp=a.tp, tactics=tried(some), **limits)
            print(", ".join(map(str, some.values())))
        return
    comm: Communicator = SingleRank()
    if a.tp > 1:
        comm = MpiCommunicator(Activity())
        assert comm.world_size == a.tp, f"start it with mpirun -n {a.tp}"
        torch.cuda.set_device(comm.rank)

    def milliseconds(taken: Chosen) -> float:
        blocks = a.tokens * (a.context // 64 + 4)
        runner, config = runner_of(
            a.shape, a.format, num_blocks=blocks, layers=a.layers, comm=comm, tactics=tried(taken), **limits
        )  # fmt: skip
        ms = min(decode_milliseconds(runner, config, a.tokens, a.context, a.steps)[0] for _ in range(2))
        runner.close()
        del runner
        gc.collect()
        ms = float(comm.exchange(str(ms))[0])  # so that all ranks take the same
        if comm.rank == 0:
            print(f"{ms:.3f} ms: {', '.join(map(str, taken.values()))}", flush=True)
        return ms

    taken, best = descend(starts, options, milliseconds, a.passes)
    comm.finish()
    if comm.rank:
        return
    print(f"{a.shape} {a.format} x{a.tokens}: {best:.3f} ms")
    for shape, tactic in taken.items():
        outputs = shape.n // 2 if shape.gated else shape.n
        print(f"    ({outputs}, {shape.k}, {bool(shape.gated)}): ({a.tokens}, {tactic.kernel!r}, {tactic.tiles}),")
    if a.output:
        rows = [{"n": s.n, "k": s.k, "gated": s.gated, "tactic": str(tactic)} for s, tactic in taken.items()]
        about = {"shape": a.shape, "format": a.format, "tp": a.tp, "tokens": a.tokens, "context": a.context, "ms": best}
        with open(a.output, "w") as f:
            json.dump({"script": "step_sweep", "machine": machine(), **about, "rows": rows}, f, indent=1)


def first_way(shape: LinearShape, tokens: int) -> Tactic | None:
    """What ships for so many tokens; None where that is cuBLASLt."""
    return next((tactic for most, tactic in shipped_tactics(shape, ARCH) if most >= tokens), None)


if __name__ == "__main__":
    main()
