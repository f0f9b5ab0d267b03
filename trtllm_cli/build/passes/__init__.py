"""Rewriting: small functions Graph -> Graph that keep the numbers the same.

Order matters in one place: gate and up are merged before dead weights are dropped.
"""

from __future__ import annotations

from collections.abc import Callable

from trtllm_cli.build.passes.drop_dead import drop_dead
from trtllm_cli.build.passes.fuse_add_norm import fuse_add_norm
from trtllm_cli.build.passes.fuse_gate_up import fuse_gate_up
from trtllm_cli.build.passes.fuse_rope_append import fuse_rope_append
from trtllm_cli.graph import Graph

PASSES: tuple[Callable[[Graph], Graph], ...] = (fuse_gate_up, fuse_rope_append, fuse_add_norm, drop_dead)


def run_passes(graph: Graph) -> Graph:
    """The graph after every pass, checked after each."""
    for rewrite in PASSES:
        graph = rewrite(graph)
        graph.check()
    return graph
