"""Work in CUDA graphs, and how long it takes on a GPU, without the host's share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def captured(stream: Any, enqueue: Callable[[], object]) -> Callable[[], None]:
    """What enqueues again, in one call, all that `enqueue` puts on the torch stream."""
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # not torch.cuda.graph, which first waits for the GPU and empties caches
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            enqueue()
        finally:
            graph.capture_end()
    return graph.replay


def graph_milliseconds(stream: Any, enqueue: Callable[[], object], repeats: int = 5) -> float:
    """Milliseconds of all that `enqueue` puts on the torch stream; the median of `repeats`, after two more."""
    import torch

    with torch.cuda.stream(stream):
        enqueue()
        stream.synchronize()
        replay = captured(stream, enqueue)
        times = []
        for _ in range(repeats + 2):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end))
    return float(sorted(times[2:])[repeats // 2])
