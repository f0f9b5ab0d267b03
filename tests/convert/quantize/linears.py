"""One linear layer: as models/stored.py declares it, and computed by the reference from what a quantizer made."""

from __future__ import annotations

import torch

from tests.tiny_configs import config
from trtllm_cli import functional as F
from trtllm_cli.functional import trace
from trtllm_cli.graph import Graph
from trtllm_cli.kernels.quantization import dequantize
from trtllm_cli.kernels.reference import Reference
from trtllm_cli.mapping import Mapping
from trtllm_cli.models.stored import declare
from trtllm_cli.quant_config import LayerQuant, QuantConfig


def linear_graph(layer: LayerQuant, rows: int, columns: int, experts: int | None = None) -> Graph:
    """x [num_tokens, columns] through the layer "l"; of experts, all of `ids`."""
    fields = layer.model_dump()
    c = config("llama", hidden_size=columns, quantization=QuantConfig(**fields))
    with trace("linear") as t:
        ids = t.input("input_ids")
        x = F.embedding(ids, F.weight("x", (4, columns), "float32"))
        stored = declare(c, Mapping().ranks[0], "l", rows, columns, None, experts=experts)
        return t.finish(F.linear(stored.prepare(x), stored.weight, **stored.op_args))


def compute(graph: Graph, parts: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The layer's output for x [tokens, columns]."""
    weights = {name: x if name == "x" else parts[name.removeprefix("l.")] for name in graph.weights}
    ids = torch.arange(len(x), dtype=torch.int32)
    return Reference(graph, weights, num_slots=1, block_size=1).step({"input_ids": ids})[0]


def linear_weight(graph: Graph, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The float32 [out, in] that the layer multiplies by."""
    (node,) = (node for node in graph.nodes if node.op == "linear")
    held = {role: parts[name.removeprefix("l.")] for role, name in node.inputs.items() if name in graph.weights}
    return dequantize(**held, quant=node.attrs.get("quant"), group_size=node.attrs.get("group_size"))
