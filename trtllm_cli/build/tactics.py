"""Choosing how linears are computed by timing: our compiled kernels against torch's, on the model's own shapes."""

from __future__ import annotations

import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from trtllm_cli.graph import Graph, Node
from trtllm_cli.kernels.cpu import library, pack
from trtllm_cli.kernels.linear_format import LinearFormat
from trtllm_cli.kernels.torch_linear import TorchLinear

ROWS = (1, 32)  # a decode step of one request, and a prefill chunk
MAX_OUT = 1024  # outputs that are timed of a wide layer; the time is scaled up
REPEATS = 5
PATIENCE = 0.05  # seconds: what takes longer is not repeated
HOPELESS = 4.0  # times slower than ours: the rest need not be timed


Shape = tuple[LinearFormat, int, int]  # outputs, inputs


def time_linears(graph: Graph, image: bytes, format_of: Callable[[Node], LinearFormat]) -> dict[str, dict[str, float]]:
    """{"native": {"1": ms, "32": ms}, "torch": ...}: all linears of one step, by how many rows it has.

    Each distinct shape is timed with random weights, on as many threads as torch has. Ours go first: torch's threads
    spin for a while after each call, and would take the processors from them. Once torch is hopelessly behind, the rest
    of its shapes are left out, and its times are what it took at least.
    """
    shapes: Counter[Shape] = Counter()
    for node in graph.nodes:
        if node.op == "linear":
            width, depth = graph.type_of(node.output).shape[-1], graph.type_of(node.inputs["x"]).shape[-1]
            assert isinstance(width, int)
            assert isinstance(depth, int)
            shapes[_timed(format_of(node)), width, depth] += 1
    generator = np.random.default_rng(0)
    weights = {
        (fmt, out, depth): torch.from_numpy(generator.standard_normal((min(out, MAX_OUT), depth), dtype=np.float32))
        for fmt, out, depth in shapes
    }
    with library.Library.load(image).pool(torch.get_num_threads()) as pool, torch.inference_mode():
        native = _time(functools.partial(_native, pool), shapes, weights)
        by_torch = _time(_torch, shapes, weights, rival=native)
    return {"native": native, "torch": by_torch}


def _timed(fmt: LinearFormat) -> LinearFormat:
    """The format that takes as long, and that any weight can be brought to."""
    return LinearFormat("bfloat16" if fmt.name == "fp4" else fmt.name, None if fmt.name == "fp4" else fmt.group_size)


def _time(
    make: Callable[[torch.Tensor, LinearFormat], Callable[[torch.Tensor], Any]],
    shapes: Counter[Shape],
    weights: dict[Shape, torch.Tensor],
    rival: dict[str, float] | None = None,
) -> dict[str, float]:
    """Milliseconds of all linears, by the number of rows; gives up where that is hopeless beside `rival`."""
    totals = dict.fromkeys(map(str, ROWS), 0.0)
    for shape, count in shapes.items():
        fmt, out_features, in_features = shape
        run = make(weights[shape], fmt)
        for rows in ROWS:
            x = torch.ones(rows, in_features)
            totals[str(rows)] += _seconds(functools.partial(run, x)) * 1e3 * count * out_features / len(weights[shape])
        if rival and all(totals[rows] > HOPELESS * rival[rows] for rows in totals):
            break
    return {rows: round(ms, 3) for rows, ms in totals.items()}


def faster(times: dict[str, dict[str, float]]) -> str:
    """ "native" or "torch": the one whose decode and prefill, weighed alike, take less."""
    ratios = [times["native"][str(rows)] / times["torch"][str(rows)] for rows in ROWS]
    return "native" if statistics.geometric_mean(ratios) <= 1 else "torch"


def _native(pool: library.Pool, weight: torch.Tensor, fmt: LinearFormat) -> Callable[[torch.Tensor], None]:
    out_features, in_features = weight.shape
    packed = pack.pack_linear(weight, fmt)
    out = torch.empty(max(ROWS), out_features)

    def run(x: torch.Tensor) -> None:
        step = library.linear_step(
            x.data_ptr(),
            out.data_ptr(),
            packed["weight"].data_ptr(),
            in_features=in_features,
            out_features=out_features,
            scale=packed["scale"].data_ptr() if "scale" in packed else None,
            **pack.step_arguments(fmt),
        )
        pool.run(library.plan([step]), _batch(len(x)))

    return run


def _torch(weight: torch.Tensor, fmt: LinearFormat) -> Callable[[torch.Tensor], Any]:
    return TorchLinear(fmt, fmt.quantize(weight), weight.shape[1])


def _batch(rows: int) -> library.TlBatch:
    """A batch of `rows` tokens; a linear reads nothing else of it."""
    return library.TlBatch(num_tokens=rows, num_seqs=1, num_logits=rows, max_blocks=1)


def _seconds(run: Callable[[], Any]) -> float:
    """The least time of some runs: what the machine's other work did not disturb."""
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
        if best > PATIENCE:
            break
    return best
