"""Rewriting: small functions Graph -> Graph that keep the numbers the same.

Order matters: gate and up are merged before dead weights are dropped, and rows are chosen early before sums are joined
with the norms behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trtllm_cli.build.passes.drop_dead import drop_dead
from trtllm_cli.build.passes.fuse_add_norm import fuse_add_norm
from trtllm_cli.build.passes.fuse_gate_up import fuse_gate_up
from trtllm_cli.build.passes.fuse_quantize import fuse_quantize
from trtllm_cli.build.passes.fuse_rope_append import fuse_rope_append
from trtllm_cli.build.passes.gather_early import gather_early
from trtllm_cli.build.passes.join_rounded_halves import join_rounded_halves
from trtllm_cli.graph import Graph

Pass = Callable[[Graph], Graph]
PASSES: tuple[Pass, ...] = (fuse_gate_up, fuse_rope_append, gather_early, fuse_add_norm, drop_dead)
CUDA_PASSES: tuple[Pass, ...] = (
    join_rounded_halves, fuse_gate_up, fuse_rope_append, gather_early, fuse_add_norm, fuse_quantize, drop_dead
)  # fmt: skip


def run_passes(graph: Graph, passes: Sequence[Pass] = PASSES) -> Graph:
    """The graph after every pass, checked after each."""
    for rewrite in passes:
        graph = rewrite(graph)
        graph.check()
    return graph
