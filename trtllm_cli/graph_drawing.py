"""A Graph as an SVG picture: nodes from top to bottom, the residual stream beside them, repeated layers drawn once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from xml.sax.saxutils import escape

from trtllm_cli.graph import Graph, Node

_LAYER = re.compile(r"layers\.(\d+)\.")
_BOX_WIDTH, _BOX_HEIGHT, _GAP, _MARGIN = 430, 40, 20, 40  # pixels
_LANE = 26  # pixels between the lines of skipping edges
_COLORS = {
    "linear": "#cfe3ff", "embedding": "#ffe7c2", "attention": "#ffd6e0", "paged_attention": "#ffd6e0",
    "rope_append": "#ffeef2", "rope": "#ffeef2", "rms_norm": "#dff5e1", "add_rms_norm": "#dff5e1",
    "layer_norm": "#dff5e1", "add_layer_norm": "#dff5e1", "act": "#fff7c2", "gated_act": "#fff7c2",
    "all_reduce": "#e4dcff", "all_gather": "#e4dcff", "send": "#e4dcff", "recv": "#e4dcff",
}  # fmt: skip


@dataclass(frozen=True)
class _Row:
    node: Node
    layer: int | None


def draw(graph: Graph) -> str:
    """The SVG text."""
    rows, repeats = _rows(graph)
    y_of = {id(row.node): _MARGIN + 40 + i * (_BOX_HEIGHT + _GAP) for i, row in enumerate(rows)}
    edges = _edges(graph, rows)
    lanes = max((lane for *_, lane in edges), default=0)
    left = _MARGIN + 20
    width = left + _BOX_WIDTH + (lanes + 1) * _LANE + _MARGIN
    height = _MARGIN * 2 + 40 + len(rows) * (_BOX_HEIGHT + _GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="ui-monospace, Menlo, monospace" font-size="12">',
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#555"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{_MARGIN}" y="{_MARGIN}" font-size="16" font-weight="bold">{escape(graph.name)}</text>',
    ]
    parts += _layer_frame(rows, y_of, repeats, left)
    for source, target, lane in edges:
        parts.append(_edge(y_of[id(source)], y_of[id(target)], lane, left))
    for row in rows:
        parts += _box(graph, row.node, y_of[id(row.node)], left)
    return "\n".join([*parts, "</svg>", ""])


def _rows(graph: Graph) -> tuple[list[_Row], int]:
    """The nodes to draw, and how many layers the drawn one stands for.

    A node belongs to the layer of its weights, and without any to that of the node before it. Every layer but the first
    is left out when all have the same ops.
    """
    rows: list[_Row] = []
    layer: int | None = None
    for node in graph.nodes:
        found = {int(m[1]) for name in node.inputs.values() if (m := _LAYER.search(name))}
        if found:
            layer = min(found)
        elif node.op in ("gather_last", "send", "embedding", "recv"):
            layer = None
        rows.append(_Row(node, layer))
    count = len({row.layer for row in rows if row.layer is not None})
    return [row for row in rows if row.layer in (None, 0)], count


def _edges(graph: Graph, rows: list[_Row]) -> list[tuple[Node, Node, int]]:
    """(from, to, lane) between drawn nodes: lane 0 is straight down, others go round on the right."""
    place = {id(row.node): i for i, row in enumerate(rows)}
    producers = graph.producers()
    all_nodes = list(graph.nodes)
    edges: list[tuple[Node, Node, int]] = []
    busy: list[tuple[int, int, int]] = []  # (from, to, lane) of edges that skip rows
    for i, row in enumerate(rows):
        for name in dict.fromkeys(row.node.inputs.values()):
            source = producers.get(name)
            if source is None:
                continue
            if id(source) not in place:  # made in a layer that is not drawn: the last drawn node before it
                before = [n for n in all_nodes[: all_nodes.index(source)] if id(n) in place]
                if not before:
                    continue
                source = before[-1]
            j = place[id(source)]
            if j == i - 1:
                edges.append((source, row.node, 0))
                continue
            taken = {lane for a, b, lane in busy if a < i and j < b}
            lane = next(n for n in range(1, len(rows) + 2) if n not in taken)
            busy.append((j, i, lane))
            edges.append((source, row.node, lane))
    return edges


def _layer_frame(rows: list[_Row], y_of: dict[int, int], repeats: int, left: int) -> list[str]:
    inside = [y_of[id(row.node)] for row in rows if row.layer == 0]
    if not inside or repeats < 2:
        return []
    top, bottom = min(inside) - _GAP // 2, max(inside) + _BOX_HEIGHT + _GAP // 2
    return [
        f'<rect x="{left - 14}" y="{top}" width="{_BOX_WIDTH + 28}" height="{bottom - top}" rx="8" fill="#f6f6f6" '
        'stroke="#999" stroke-dasharray="5 4"/>',
        f'<text x="{left - 22}" y="{(top + bottom) // 2}" font-size="14" font-weight="bold" fill="#666" '
        f'text-anchor="middle" transform="rotate(-90 {left - 22} {(top + bottom) // 2})">'
        f"one layer of {repeats}</text>",
    ]


def _edge(y_from: int, y_to: int, lane: int, left: int) -> str:
    style = 'fill="none" stroke="#555" stroke-width="1.3" marker-end="url(#a)"'
    if lane == 0:
        x = left + _BOX_WIDTH // 2
        return f'<path d="M{x} {y_from + _BOX_HEIGHT}L{x} {y_to - 2}" {style}/>'
    right = left + _BOX_WIDTH
    x, start, end = right + lane * _LANE, y_from + _BOX_HEIGHT // 2, y_to + _BOX_HEIGHT // 2
    return f'<path d="M{right} {start}H{x}V{end}H{right + 2}" {style}/>'


def _box(graph: Graph, node: Node, y: int, left: int) -> list[str]:
    color = _COLORS.get(node.op, "#eeeeee")
    weights = [graph.weights[name] for name in node.inputs.values() if name in graph.weights]
    detail = ", ".join(str(w.type) for w in weights[:2]) + (" ..." if len(weights) > 2 else "")
    named = next((name for name in node.inputs.values() if name in graph.weights), "")
    named = _LAYER.sub("layers.*.", named).removesuffix(".weight")
    out = ", ".join(str(graph.tensors[name]) for name in node.outputs[:1])
    second = escape(f"{detail + ' ' if detail else ''}{'-> ' + out if out else ''}")
    return [
        f'<rect x="{left}" y="{y}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="5" fill="{color}" stroke="#777"/>',
        f'<text x="{left + 10}" y="{y + 16}"><tspan font-weight="bold">{escape(node.op)}</tspan> '
        f'<tspan fill="#444">{escape(named)}</tspan></text>',
        f'<text x="{left + 10}" y="{y + 32}" fill="#666" font-size="11">{second}</text>',
    ]
