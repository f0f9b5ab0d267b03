"""The memory plan: which activation lives in which buffer, so that buffers are used again once nothing reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trtllm_cli.functional import NUM_LOGITS, NUM_TOKENS
from trtllm_cli.graph import Graph

_IN_PLACE = {"add", "mul", "scale", "softcap", "act", "rope", "qdq"}


@dataclass(frozen=True)
class Buffer:
    """Room for `rows` (a symbol) times `width` elements."""

    rows: str
    width: int


@dataclass(frozen=True)
class BufferPlan:
    """The buffers, and the index of each tensor's."""

    buffers: tuple[Buffer, ...]
    of: dict[str, int]

    def elements(self, sizes: dict[str, int]) -> int:
        """Elements in all, when the symbols have these sizes."""
        return sum(sizes[b.rows] * b.width for b in self.buffers)


def plan_buffers(
    graph: Graph, size_of: Callable[[str], int] = lambda _: 1, *, gathers_in_place: bool = False
) -> BufferPlan:
    """Gives each node output a buffer: the best fitting one that is free, widened if need be, or a new one.

    Widths are in elements, or with `size_of`, a tensor's bytes an element, in bytes.

    A sum takes its residual's buffer over when that is read for the last time there, as does what is made of each
    element by itself. With `gathers_in_place` so do gathered rows, which are then the buffer's first.
    """
    last_read = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs.values()}
    last_read |= dict.fromkeys(graph.outputs, len(graph.nodes))
    rows_of: list[str] = []
    widths: list[int] = []
    of: dict[str, int] = {}
    free: dict[str, set[int]] = {NUM_TOKENS: set(), NUM_LOGITS: set()}
    for i, node in enumerate(graph.nodes):
        taken_over = ""
        for name in node.outputs:
            rows, width = graph.tensors[name].shape
            assert isinstance(rows, str)
            assert isinstance(width, int)
            width *= size_of(name)
            heir = _inherited(node.op, node.inputs, node.outputs, name)
            fits = heir in of and _same_size(graph, heir, name, size_of)
            if gathers_in_place and node.op == "gather_last":
                heir, fits = node.inputs["x"], True
            if fits and last_read[heir] == i:
                of[name], taken_over = of[heir], heir
            elif free[rows]:
                index = min(free[rows], key=lambda b: (widths[b] < width, abs(widths[b] - width), b))
                free[rows].remove(index)
                widths[index] = max(widths[index], width)
                of[name] = index
            else:
                of[name] = len(widths)
                rows_of.append(rows)
                widths.append(width)
        for name in {*node.inputs.values(), *node.outputs} & graph.tensors.keys():
            if last_read.get(name, i) <= i and name != taken_over:
                free[rows_of[of[name]]].add(of[name])
    return BufferPlan(tuple(Buffer(r, w) for r, w in zip(rows_of, widths, strict=True)), of)


def _same_size(graph: Graph, a: str, b: str, size_of: Callable[[str], int]) -> bool:
    return graph.tensors[a].shape == graph.tensors[b].shape and size_of(a) == size_of(b)


def _inherited(op: str, inputs: dict[str, str], outputs: tuple[str, ...], name: str) -> str:
    """The operand whose buffer the output may take over, or nothing."""
    if op in ("add_rms_norm", "add_layer_norm"):
        return inputs["residual"] if name == outputs[1] else ""
    if op == "gated_act":
        return inputs.get("gate", "")
    return inputs["x"] if op in _IN_PLACE else ""
