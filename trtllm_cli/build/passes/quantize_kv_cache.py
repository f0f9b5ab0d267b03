"""Says of each attention how its cache is quantized, where the engine wants that and the checkpoint has no scales."""

from __future__ import annotations

from dataclasses import replace

from trtllm_cli.graph import Graph


def quantize_kv_cache(graph: Graph, kv_quant: str) -> Graph:
    """The traced graph with `kv_quant` in its attention nodes; those without a `kv_scale` have scales of one."""
    nodes = [
        replace(node, attrs={**node.attrs, "kv_quant": kv_quant}) if node.op == "attention" else node
        for node in graph.nodes
    ]
    return graph.with_nodes(nodes)
