"""Two linears as one: their weights stacked, gate above up, for the activation that reads both."""

from __future__ import annotations

from trtllm_cli.graph import Graph, Node, TensorType, Weight


def stack_halves(
    graph: Graph, weights: dict[str, Weight], tensors: dict[str, TensorType], act: Node, gate: Node, up: Node, x: str
) -> list[Node]:
    """A linear of `x` with both weights, and `act` on its output: the gate's columns, then up's.

    Adds the stacked weights to `weights`, and the linear's output to `tensors`.
    """
    inputs = {"x": x} | {
        role: stack_weights(weights, name, up.inputs[role]) for role, name in gate.inputs.items() if role != "x"
    }
    joint = f"{gate.output}.{up.output}"
    kind = graph.type_of(gate.output)
    width = kind.shape[-1]
    assert isinstance(width, int)
    tensors[joint] = TensorType(kind.dtype, (*kind.shape[:-1], 2 * width))
    return [
        Node("linear", inputs, (joint,), gate.attrs),
        Node("gated_act", {"x": joint}, act.outputs, act.attrs),
    ]


def stack_weights(weights: dict[str, Weight], first: str, second: str) -> str:
    """The name of a new weight in `weights`: the rows of the one, then those of the other."""
    a, b = weights[first], weights[second]
    name = f"{first}+{second.rsplit('.', 2)[-2]}"
    weights[name] = Weight(a.dtype, (a.shape[0] + b.shape[0], *a.shape[1:]), a.parts + b.parts, a.shard)
    return name
