"""Chooses the rows whose logits are wanted before the last layer's attention, not behind its MLP.

Of all other tokens the last layer's keys and values are wanted, and nothing more: most of a prompt need not go through
its attention, its MLP and what lies between.
"""

from __future__ import annotations

from dataclasses import replace

from trtllm_cli.graph import Graph, Node, TensorType

# Each row of what these make is made of the same row of what they read.
_BY_ROW = {
    "add", "mul", "scale", "softcap", "act", "gated_act", "linear", "head_linear", "rms_norm", "layer_norm", "qdq",
    "gather_columns", "split", "concat", "route", "expert_linear", "expert_gated_act", "combine", "all_reduce",
}  # fmt: skip
_ATTENTION = {"attention", "paged_attention"}


def gather_early(graph: Graph) -> Graph:
    """`gather_last(f(attention(q), x))` becomes `f(attention(gather_last(q), rows), gather_last(x))`.

    `f` is whatever computes each row by itself; an attention with `rows` is of the tokens that these name. What is
    gathered, and all that is made of it, comes last in the graph. Sums over ranks move in pairs: an odd number of
    calls that a step without logits leaves out would upset whose turn it is to have which memory
    (kernels/triton/collectives.py).
    """
    gathers = [node for node in graph.nodes if node.op == "gather_last"]
    late = _late(graph, gathers[0]) if len(gathers) == 1 else []
    if not late or sum(node.op == "all_reduce" for node in late) % 2:
        return graph
    (gather,) = gathers
    chosen, rows = gather.inputs["x"], gather.inputs["indices"]
    made, producers = {name for node in late for name in node.outputs}, graph.producers()
    types = {name: _of_rows(graph, name, rows) for name in made}
    gathered: dict[str, Node] = {}

    def at_rows(name: str) -> str:
        """The tensor of just these rows."""
        if name in made or name not in graph.tensors:
            return name
        out, maker = f"{name}.rows", producers[name]
        if out not in types:
            types[out] = _of_rows(graph, name, rows)
            if maker.op == "qdq":  # which is what tells linears on both sides that their inputs are quantized
                x = at_rows(maker.inputs["x"])
                gathered[out] = replace(maker, inputs={**maker.inputs, "x": x}, outputs=(out,))
            else:
                gathered[out] = Node("gather_last", {"x": name, "indices": rows}, (out,))
        return out

    moved = []
    for node in late:
        if node.op in _ATTENTION:  # whose keys and values are of all tokens
            inputs = {**node.inputs, "q": at_rows(node.inputs["q"]), "rows": rows}
        else:
            inputs = {role: at_rows(name) for role, name in node.inputs.items()}
        moved.append(replace(node, inputs=inputs))
    before: list[Node] = []
    after: list[Node] = []
    behind = {gather.output}
    for node in graph.nodes:
        if node is gather or made.intersection(node.outputs):
            continue
        if behind.intersection(node.inputs.values()):
            behind.update(node.outputs)
            inputs = {role: chosen if name == gather.output else name for role, name in node.inputs.items()}
            after.append(replace(node, inputs=inputs))
        else:
            before.append(node)
    return graph.with_nodes([*before, *gathered.values(), *moved, *after], types)


def _late(graph: Graph, gather: Node) -> list[Node]:
    """Nodes of which nothing but the wanted rows is read, in order."""
    consumers = graph.consumers()
    late: dict[int, Node] = {}
    for node in reversed(graph.nodes):
        readers = [reader for name in node.outputs for reader in consumers.get(name, [])]
        if (
            node.op in _BY_ROW | _ATTENTION
            and readers
            and not set(node.outputs) & set(graph.outputs)
            and all(r is gather or (id(r) in late and r.op not in _ATTENTION) for r in readers)
        ):
            late[id(node)] = node
    return list(late.values())[::-1]


def _of_rows(graph: Graph, name: str, rows: str) -> TensorType:
    kind = graph.type_of(name)
    return TensorType(kind.dtype, (*graph.type_of(rows).shape, *kind.shape[1:]))
