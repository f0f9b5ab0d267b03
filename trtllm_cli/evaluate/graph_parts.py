"""What a traced graph of one whole model is made of: body and head, linears by module, decoder layers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from trtllm_cli.errors import UnsupportedError
from trtllm_cli.graph import Graph, Node

_LAYER = re.compile(r"transformer\.layers\.(\d+)\.")
_COLLECTIVES = ("all_reduce", "all_gather", "send", "recv")


@dataclass(frozen=True)
class Step:
    """A node, and the tensors that nothing reads after it."""

    node: Node
    dead: tuple[str, ...]


@dataclass(frozen=True)
class Parts:
    """A graph cut where it selects the rows whose logits are wanted."""

    body: list[Step]  # for every token
    head: list[Step]  # for a row whose logits are wanted
    hidden: str  # what the body makes, [num_tokens, hidden_size]
    selected: str  # the same as the head reads it, [num_logits, hidden_size]


def cut(graph: Graph) -> Parts:
    """The graph's parts. Raises UnsupportedError where there are several ranks, or no such cut."""
    if any(node.op in _COLLECTIVES for node in graph.nodes):
        raise UnsupportedError(f"{graph.name} is a part of a model, for one of several ranks")
    gathers = [node for node in graph.nodes if node.op == "gather_last"]
    if len(gathers) != 1:
        raise UnsupportedError(
            f"{graph.name} has {len(gathers)} gather_last ops: to be evaluated it must select its rows once",
            fix="use functional.gather_last once, before the last norm",
        )
    (gather,) = gathers
    late = {gather.output}  # what depends on the selection
    body, head = [], []
    for node in graph.nodes:
        if node is gather:
            continue
        if late.isdisjoint(node.inputs.values()):
            body.append(node)
        else:
            head.append(node)
            late.update(node.outputs)
    hidden = gather.inputs["x"]
    return Parts(_steps(body, (hidden,)), _steps(head, graph.outputs), hidden, gather.output)


def _steps(nodes: list[Node], kept: tuple[str, ...]) -> list[Step]:
    """The nodes that `kept` needs, each with what dies there."""
    needed, steps = set(kept), []
    for node in reversed(nodes):
        if needed.isdisjoint(node.outputs):
            continue
        dead = tuple(name for name in {*node.inputs.values(), *node.outputs} if name not in needed)
        needed.update(node.inputs.values())
        steps.append(Step(node, dead))
    return steps[::-1]


def module_names(graph: Graph) -> dict[str, str]:
    """Output of a linear or expert_linear -> its module's name in the whole model; a tied head is "lm_head"."""
    tables = {node.inputs["weight"] for node in graph.nodes if node.op == "embedding"}
    names = {}
    for node in graph.nodes:
        if node.op in ("linear", "expert_linear"):
            weight = node.inputs["weight"]
            names[node.output] = "lm_head" if weight in tables else weight.removesuffix(".weight")
    return names


@dataclass(frozen=True)
class Linear:
    """A linear or expert_linear with what its quantization does to its input before."""

    node: Node
    prepare: tuple[Node, ...]  # reorder, scale, round; in order
    root: str  # the tensor that the layer is given

    @property
    def experts(self) -> str | None:
        """The tensor that says which experts each token goes to, of an expert_linear."""
        return self.node.inputs.get("ids")


def linears(graph: Graph) -> dict[str, Linear]:
    """Every linear and expert_linear by its module's name, in order."""
    producers, found = graph.producers(), {}
    for output, module in module_names(graph).items():
        node = producers[output]
        root, prepare = node.inputs["x"], []
        while (before := producers.get(root)) is not None and _prepares(before, module):
            prepare.append(before)
            root = before.inputs["x"]
        found[module] = Linear(node, tuple(reversed(prepare)), root)
    return found


def _prepares(node: Node, module: str) -> bool:
    """Whether the node is a part of how `module` is quantized (models/stored.py): it reads none but its weights."""
    others = [name for role, name in node.inputs.items() if role != "x"]
    return node.op in ("gather_columns", "mul", "qdq") and all(name.startswith(f"{module}.") for name in others)


def layer_outputs(graph: Graph, hidden: str) -> dict[int, str]:
    """Decoder layer -> the tensor that it hands to the next, the residual stream; the last layer's is `hidden`."""
    layer_of: dict[str, int] = {}
    handed: dict[int, str] = {}
    for node in graph.nodes:
        own = [int(match[1]) for name in node.inputs.values() if (match := _LAYER.match(name))]
        before = [layer_of[name] for name in node.inputs.values() if name in layer_of]
        layer = max(own + before, default=-1)
        for name in node.inputs.values():
            if 0 <= layer_of.get(name, -1) < layer:
                handed[layer_of[name]] = name
        layer_of.update(dict.fromkeys(node.outputs, layer))
    if hidden in layer_of and layer_of[hidden] >= 0:
        handed[layer_of[hidden]] = hidden
    return handed
