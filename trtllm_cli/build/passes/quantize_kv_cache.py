"""Says of each attention how its cache is quantized, where the engine wants that and the checkpoint has no scales."""

from __future__ import annotations

from dataclasses import replace

from trtllm_cli.errors import UnsupportedError
from trtllm_cli.graph import Graph


def quantize_kv_cache(graph: Graph, kv_quant: str | None) -> Graph:
    """The traced graph with `kv_quant` in its attention nodes; those without a `kv_scale` have scales of one.

    Raises UnsupportedError where the model says something else of its cache.
    """
    nodes = []
    for node in graph.nodes:
        if node.op == "attention":
            found = node.attrs.get("kv_quant", kv_quant)
            if found != kv_quant:
                raise UnsupportedError(
                    f"the model keeps the KV cache of layer {node.attrs['layer']} in {found}, its checkpoint does not",
                    where="config.json: quantization.kv_cache_quant_algo",
                    fix=f"set it to {str(found).upper()}, or leave `kv_quant` out of the model",
                )
            node = replace(node, attrs={**node.attrs, "kv_quant": kv_quant}) if kv_quant else node
        nodes.append(node)
    return graph.with_nodes(nodes)
