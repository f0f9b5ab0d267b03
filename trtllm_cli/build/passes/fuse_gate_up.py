"""Joins the MLP's two projections of the same input: one linear with their weights stacked."""

from __future__ import annotations

from trtllm_cli.build.passes.stack_halves import stack_halves
from trtllm_cli.graph import Graph, Node, TensorType


def fuse_gate_up(graph: Graph) -> Graph:
    """`gated_act(linear(x, w1), linear(x, w2))` becomes `gated_act(linear(x, [w1; w2]))`, its input gate then up."""
    producers, consumers = graph.producers(), graph.consumers()
    weights = dict(graph.weights)
    tensors: dict[str, TensorType] = {}
    replaced: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if node.op != "gated_act" or "gate" not in node.inputs:
            continue
        gate, up = producers.get(node.inputs["gate"]), producers.get(node.inputs["up"])
        if gate is None or up is None or gate is up or not _alike(graph, gate, up):
            continue
        if any(len(consumers[name]) != 1 for name in node.inputs.values()):
            continue
        replaced[id(gate)] = []
        replaced[id(up)] = []
        replaced[id(node)] = stack_halves(graph, weights, tensors, node, gate, up, gate.inputs["x"])
    nodes = [new for node in graph.nodes for new in replaced.get(id(node), [node])]
    joined = Graph(graph.name, graph.inputs, weights, graph.nodes, graph.tensors, graph.outputs)
    return joined.with_nodes(nodes, tensors)


def _alike(graph: Graph, a: Node, b: Node) -> bool:
    """Whether two linears read the same input and store their weights the same way."""
    return (
        a.op == b.op == "linear"
        and a.inputs["x"] == b.inputs["x"]
        and a.inputs.keys() == b.inputs.keys()
        and a.attrs == b.attrs
        and graph.type_of(a.output) == graph.type_of(b.output)
        and all(_has_rows(graph, node) for node in (a, b))
    )


def _has_rows(graph: Graph, node: Node) -> bool:
    """Whether what belongs to the weight has a row for each of its outputs: one scale for all cannot be stacked."""
    companions = [graph.weights[name] for role, name in node.inputs.items() if role != "x"]
    return all(w.shape[0] == graph.weights[node.inputs["weight"]].shape[0] for w in companions)
