"""Drops nodes whose outputs nobody reads."""

from __future__ import annotations

from trtllm_cli.graph import Graph, Node

# These do something besides making their outputs: they write the KV cache or talk to another rank.
_WITH_EFFECTS = {"attention", "rope_append", "send", "recv", "all_reduce", "all_gather"}


def drop_dead(graph: Graph) -> Graph:
    """The graph without nodes that change nothing."""
    wanted = set(graph.outputs)
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if node.op in _WITH_EFFECTS or wanted.intersection(node.outputs):
            kept.append(node)
            wanted.update(node.inputs.values())
    return graph.with_nodes(kept[::-1])
