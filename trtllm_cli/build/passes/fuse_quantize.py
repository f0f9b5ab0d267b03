"""Lets the op that makes a linear's input write it in FP8, so that an FP8 linear reads it as it is."""

from __future__ import annotations

from dataclasses import replace

from trtllm_cli.graph import Graph, Node, TensorType
from trtllm_cli.models.stored import FP8_BLOCK

_FUSED = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "gated_act", "expert_gated_act")
_LINEARS = ("linear", "expert_linear")


def fuse_quantize(graph: Graph) -> Graph:
    """`linear(qdq(f(x)))`, all in FP8, becomes `q, step = f(x) with out_quant; linear(q, x_scale=step)`.

    `out_quant` is "static", the step being a weight [1] under "out_scale", or "token": found for each row, a second (of
    add_rms_norm a third) output. Where the input cannot be quantized as it is made, a `quantize` node does it. So too
    for expert_linear. With `out_group` each part of a row has a step of its own: an expert's, or a group's of inputs
    where the weight has scales of groups as well.
    """
    producers, consumers = graph.producers(), graph.consumers()
    tensors: dict[str, TensorType] = {}
    step_of: dict[str, str] = {}  # quantized tensor -> its step
    replaced: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if node.op != "qdq" or not _all_fp8(graph, node, consumers.get(node.output, [])):
            continue
        q = node.output
        rows, width = graph.type_of(q).shape
        assert isinstance(width, int)
        how = "static" if "scale" in node.inputs else "token"
        steps: tuple[str, ...] = () if how == "static" else (f"{q}.step",)
        step_of[q] = node.inputs["scale"] if how == "static" else steps[0]
        group = {"out_group": node.attrs["group_size"]} if "group_size" in node.attrs else {}
        parts = width // node.attrs.get("group_size", width)
        tensors |= {name: TensorType("float32", (rows, parts)) for name in steps}
        tensors[q] = TensorType("float8_e4m3fn", graph.type_of(q).shape)
        operands = {"out_scale": node.inputs["scale"]} if how == "static" else {}
        maker = producers.get(node.inputs["x"])
        fused = (
            maker is not None
            and (
                (maker.op in _FUSED and not maker.attrs.get("num_heads"))
                or (maker.op == "paged_attention" and how == "static")
            )
            and (how == "static" or parts == maker.attrs.get("top_k", 1) or maker.op != "expert_gated_act")
            and maker.outputs[0] == node.inputs["x"]
            and len(consumers[node.inputs["x"]]) == 1
            and node.inputs["x"] not in graph.outputs
        )
        if fused and maker is not None:
            outputs = (q, *maker.outputs[1:], *steps)
            attrs = {**maker.attrs, "out_quant": how, **group}
            replaced[id(maker)] = [Node(maker.op, {**maker.inputs, **operands}, outputs, attrs)]
            replaced[id(node)] = []
        else:
            replaced[id(node)] = [
                Node("quantize", {"x": node.inputs["x"], **operands}, (q, *steps), {"out_quant": how, **group})
            ]
    nodes = []
    for node in graph.nodes:
        for new in replaced.get(id(node), [node]):
            step = step_of.get(new.inputs.get("x", "")) if new.op in _LINEARS else None
            nodes.append(replace(new, inputs={**new.inputs, "x_scale": step}) if step else new)
    return graph.with_nodes(nodes, tensors)


def _all_fp8(graph: Graph, node: Node, readers: list[Node]) -> bool:
    """Whether a qdq is to FP8, and all that read it are FP8 linears that can take its steps."""
    return (
        node.attrs["fmt"] == "fp8"
        and bool(readers)
        and all(
            r.op in _LINEARS
            and r.attrs.get("quant") == "fp8"
            and r.inputs["x"] == node.output
            and _takes_steps(graph, r, node.attrs.get("group_size"))
            for r in readers
        )
    )


def _takes_steps(graph: Graph, linear: Node, group: int | None) -> bool:
    """Whether a linear can take one step, or one a row; or one for each `group` of a row: an expert's part, or with
    scales of the same groups each of several.
    """
    of_weight = linear.attrs.get("group_size")
    inputs = graph.weights[linear.inputs["weight"]].shape[-1]
    if of_weight:
        return linear.op == "linear" and group == of_weight == FP8_BLOCK < inputs and inputs % FP8_BLOCK == 0
    return not group or (linear.op == "expert_linear" and group == inputs)
