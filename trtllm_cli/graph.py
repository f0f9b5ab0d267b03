"""The Graph: what a model computes on one rank, as plain frozen data.

Nodes are in execution order and name their operands. A tensor name is a graph input, a weight, or the output of one
earlier node. Dimensions are integers or symbols: "num_tokens" (tokens of the step, all sequences end to end),
"num_seqs", "num_logits" (tokens whose logits are wanted), "max_blocks" (blocks of a sequence).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Dim = int | str
# How a weight is split over the tensor-parallel ranks: its rows (outputs, dim 0), its columns (inputs, dim 1), its rows
# by heads (q, k and v each), or not at all. Of a weight [experts, out, in], dim 0 over the expert-parallel ranks, and
# over those that share an expert: both halves of dim 1 (up and gate), all of dim 1, dim 2, or with "experts" nothing.
Shard = Literal["rows", "columns", "qkv", "experts", "expert_halves", "expert_rows", "expert_columns"]


@dataclass(frozen=True)
class TensorType:
    """A tensor's dtype (torch's name for it) and shape."""

    dtype: str
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Weight:
    """A weight as this rank holds it. `parts` are the checkpoint's tensors that it is made of, stacked on dim 0."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    shard: Shard | None = None

    @property
    def type(self) -> TensorType:
        """Its tensor type."""
        return TensorType(self.dtype, self.shape)


@dataclass(frozen=True)
class Node:
    """One operation. `inputs` maps each operand's role ("x", "weight", ...) to a tensor's name."""

    op: str
    inputs: dict[str, str]
    outputs: tuple[str, ...]
    attrs: dict[str, Any] = field(default_factory=dict)  # JSON values

    @property
    def output(self) -> str:
        """The only output."""
        (name,) = self.outputs
        return name


@dataclass(frozen=True)
class Graph:
    """A model on one rank: what goes in, the weights, the nodes in order, and what comes out."""

    name: str
    inputs: dict[str, TensorType]
    weights: dict[str, Weight]
    nodes: tuple[Node, ...]
    tensors: dict[str, TensorType]  # every node's outputs
    outputs: tuple[str, ...]

    def type_of(self, name: str) -> TensorType:
        """The type of an input, weight or node output."""
        if name in self.tensors:
            return self.tensors[name]
        return self.weights[name].type if name in self.weights else self.inputs[name]

    def producers(self) -> dict[str, Node]:
        """Tensor name -> the node that makes it."""
        return {name: node for node in self.nodes for name in node.outputs}

    def consumers(self) -> dict[str, list[Node]]:
        """Tensor name -> the nodes that read it, in order."""
        readers: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs.values()):
                readers.setdefault(name, []).append(node)
        return readers

    def with_nodes(self, nodes: list[Node], tensors: Mapping[str, TensorType] | None = None) -> Graph:
        """This graph with other nodes; what nothing reads any more is dropped from `tensors` and `weights`."""
        known = {**self.tensors, **(tensors or {})}
        read = {name for node in nodes for name in node.inputs.values()} | set(self.outputs)
        made = [name for node in nodes for name in node.outputs]
        return replace(
            self,
            nodes=tuple(nodes),
            tensors={name: known[name] for name in made},
            weights={name: weight for name, weight in self.weights.items() if name in read},
        )

    def check(self) -> None:
        """Asserts that each operand exists before it is read, and that no name is made twice."""
        known = set(self.inputs) | set(self.weights)
        for node in self.nodes:
            for role, name in node.inputs.items():
                assert name in known, f"{node.op}: operand {role}={name} is read before it is made"
            for name in node.outputs:
                assert name not in known, f"{node.op}: {name} is made twice"
                assert name in self.tensors, f"{node.op}: {name} has no type"
                known.add(name)
        assert set(self.outputs) <= known, f"no node makes {set(self.outputs) - known}"

    def lines(self) -> Iterator[str]:
        """The graph as text, a node a line."""
        yield f"graph {self.name}("
        for name, tensor in self.inputs.items():
            yield f"    {name}: {tensor}"
        yield "):"
        for node in self.nodes:
            outs = ", ".join(f"%{name}: {self.tensors[name]}" for name in node.outputs)
            args = [f"{role}={self._reference(name)}" for role, name in node.inputs.items()]
            args += [f"{key}={json.dumps(value)}" for key, value in node.attrs.items() if value is not None]
            yield f"    {outs + ' = ' if outs else ''}{node.op}({', '.join(args)})"
        yield f"    return {', '.join(self._reference(name) for name in self.outputs)}"

    def _reference(self, name: str) -> str:
        return f"@{name}" if name in self.weights else f"%{name}" if name in self.tensors else name

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def to_json(self) -> dict[str, Any]:
        """The graph as JSON values; `from_json` gives it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Graph:
        """The graph that `to_json` wrote, also after a trip through JSON text."""
        return cls(
            name=data["name"],
            inputs={k: _type(v) for k, v in data["inputs"].items()},
            weights={
                k: Weight(v["dtype"], tuple(v["shape"]), tuple(v["parts"]), v["shard"])
                for k, v in data["weights"].items()
            },
            nodes=tuple(Node(n["op"], n["inputs"], tuple(n["outputs"]), n["attrs"]) for n in data["nodes"]),
            tensors={k: _type(v) for k, v in data["tensors"].items()},
            outputs=tuple(data["outputs"]),
        )


def _type(data: Mapping[str, Any]) -> TensorType:
    return TensorType(data["dtype"], tuple(data["shape"]))
