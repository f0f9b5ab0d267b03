"""Joins the residual add with the norm that reads its sum: one pass over the row instead of two."""

from __future__ import annotations

from trtllm_cli.graph import Graph, Node


def fuse_add_norm(graph: Graph) -> Graph:
    """`s = add(a, b); n = rms_norm(s)` becomes `n, s = add_rms_norm(x=b, residual=a)`; and so for layer_norm.

    The norm must come right after the add, or after nodes that do not read the sum; a bias (one row) is no residual.
    """
    consumers = graph.consumers()
    fused: dict[str, Node] = {}  # name of a sum -> the joint node
    norms: set[str] = set()  # outputs of norms that are now inside one
    for add in graph.nodes:
        if add.op != "add" or len(graph.type_of(add.inputs["y"]).shape) != 2:
            continue
        reader = next(iter(consumers.get(add.output, ())), None)
        if reader is None or reader.op not in ("rms_norm", "layer_norm") or reader.attrs.get("num_heads"):
            continue
        weights = {role: name for role, name in reader.inputs.items() if role != "x"}
        inputs = {"x": add.inputs["y"], "residual": add.inputs["x"], **weights}
        outputs = (reader.output, add.output)
        fused[add.output] = Node(f"add_{reader.op}", inputs, outputs, {"eps": reader.attrs["eps"]})
        norms.add(reader.output)
    nodes = []
    for node in graph.nodes:
        if len(node.outputs) == 1 and node.output in norms:
            continue
        nodes.append(fused[node.output] if node.op == "add" and node.output in fused else node)
    return graph.with_nodes(nodes)
