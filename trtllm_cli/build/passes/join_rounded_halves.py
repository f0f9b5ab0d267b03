"""Joins gate and up where each rounds its own input: FP8 with a scale per tensor, or per output and token."""

from __future__ import annotations

from dataclasses import replace

from trtllm_cli.build.passes.stack_halves import stack_halves, stack_weights
from trtllm_cli.graph import Graph, Node, TensorType


def join_rounded_halves(graph: Graph) -> Graph:
    """`gated_act(linear(qdq(x, a), w1), linear(qdq(x, b), w2))` becomes `gated_act(linear(qdq(x, [a; b]), [w1; w2]))`.

    Where each weight has one scale, the joint one's are [2], one for each half of the rows. qdq takes the larger of its
    steps: the same numbers where both layers were calibrated on their input, which is the same; where a checkpoint has
    two different ones, x is rounded as TensorRT-LLM rounds it, by the larger.
    """
    producers, consumers = graph.producers(), graph.consumers()
    weights = dict(graph.weights)
    tensors: dict[str, TensorType] = {}
    replaced: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if node.op != "gated_act" or "gate" not in node.inputs:
            continue
        halves = [producers.get(node.inputs[role]) for role in ("gate", "up")]
        rounded = [producers.get(half.inputs["x"]) if half else None for half in halves]
        if not _alike(graph, halves, rounded) or any(len(consumers[name]) != 1 for name in node.inputs.values()):
            continue
        (gate, up), (q_gate, q_up) = [h for h in halves if h], [q for q in rounded if q]
        steps = {}
        if "scale" in q_gate.inputs:
            steps["scale"] = stack_weights(weights, q_gate.inputs["scale"], q_up.inputs["scale"])
        replaced |= {id(q_gate): [], id(q_up): [], id(gate): [], id(up): []}
        replaced[id(node)] = [
            replace(q_gate, inputs={**q_gate.inputs, **steps}),
            *stack_halves(graph, weights, tensors, node, gate, up, q_gate.output),
        ]
    nodes = [new for node in graph.nodes for new in replaced.get(id(node), [node])]
    return Graph(graph.name, graph.inputs, weights, graph.nodes, graph.tensors, graph.outputs).with_nodes(
        nodes, tensors
    )


def _alike(graph: Graph, halves: list[Node | None], rounded: list[Node | None]) -> bool:
    """Whether both are linears of the same rounded input, each with one scale or one an output."""
    (gate, up), (q_gate, q_up) = halves, rounded
    if gate is None or up is None or q_gate is None or q_up is None or gate is up:
        return False
    readers = graph.consumers()
    return (
        gate.op == up.op == "linear"
        and gate.attrs == up.attrs
        and gate.inputs.keys() == up.inputs.keys() == {"x", "weight", "scale"}
        and q_gate.op == q_up.op == "qdq"
        and q_gate.attrs == q_up.attrs
        and q_gate.attrs["fmt"] == "fp8"
        and q_gate.inputs.keys() == q_up.inputs.keys()
        and q_gate.inputs["x"] == q_up.inputs["x"]
        and all(len(readers[q.output]) == 1 or q_gate is q_up for q in (q_gate, q_up))
        and graph.type_of(gate.output) == graph.type_of(up.output)
        and _scales(graph, gate) == _scales(graph, up) != 0
    )


def _scales(graph: Graph, linear: Node) -> int:
    """How many scales a weight has: one, or one an output; 0 for other shapes."""
    shape, rows = graph.weights[linear.inputs["scale"]].shape, graph.weights[linear.inputs["weight"]].shape[0]
    return shape[0] if shape in ((1,), (rows,)) else 0
