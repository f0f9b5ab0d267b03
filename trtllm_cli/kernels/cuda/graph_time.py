"""How long work takes on a GPU, without the host's share: in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def graph_milliseconds(stream: Any, enqueue: Callable[[], object], repeats: int = 5) -> float:
    """Milliseconds of all that `enqueue` puts on the torch stream; the median of `repeats`, after two more."""
    import torch

    with torch.cuda.stream(stream):
        enqueue()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            enqueue()
        times = []
        for _ in range(repeats + 2):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end))
    return float(sorted(times[2:])[repeats // 2])
