"""Joins everything between the qkv projection and attention: split, q/k norm, rotary positions, the cache's append."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trtllm_cli.graph import Graph, Node


def fuse_rope_append(graph: Graph) -> Graph:
    """`split, rms_norm and rope of q and k if any, attention` becomes `q = rope_append(qkv), paged_attention(q)`."""
    producers = graph.producers()
    readers = {name: len(nodes) for name, nodes in graph.consumers().items()}
    replaced: dict[int, list[Node]] = {}
    for node in graph.nodes:
        chain = _chain(producers, node) if node.op == "attention" else None
        if chain is None or any(readers[name] > 1 for name in chain.between) or chain.between & set(graph.outputs):
            continue
        for old in (chain.split, *chain.ropes, *chain.norms):
            replaced[id(old)] = []
        replaced[id(node)] = _joint(node, chain)
    return graph.with_nodes([new for node in graph.nodes for new in replaced.get(id(node), [node])])


@dataclass
class _Chain:
    """What makes an attention's q, k and v: the split, and for q and k the norms and the ropes, or none."""

    split: Node
    norms: list[Node] = field(default_factory=list)
    ropes: list[Node] = field(default_factory=list)

    @property
    def between(self) -> set[str]:
        """Tensors that are gone when all is joined."""
        return {name for node in (self.split, *self.norms, *self.ropes) for name in node.outputs}


def _joint(attention: Node, chain: _Chain) -> list[Node]:
    a = attention.attrs
    kept = ("layer", "num_heads", "num_kv_heads", "head_dim", "kv_quant")
    attrs: dict[str, Any] = {name: a[name] for name in kept if name in a}
    inputs = {"qkv": chain.split.inputs["x"]}
    if chain.ropes:
        inputs["positions"] = chain.ropes[0].inputs["positions"]
        attrs["rope"] = chain.ropes[0].attrs["rope"]
    if chain.norms:
        inputs["q_norm"], inputs["k_norm"] = (n.inputs["weight"] for n in chain.norms)
        attrs["eps"] = chain.norms[0].attrs["eps"]
    for role in ("slot_mapping", "kv_scale"):
        if role in attention.inputs:
            inputs[role] = attention.inputs[role]
    reads = {k: v for k, v in attention.inputs.items() if k not in ("k", "v", "slot_mapping")}
    return [
        Node("rope_append", inputs, (attention.inputs["q"],), attrs),
        Node("paged_attention", reads, attention.outputs, a),
    ]


def _chain(producers: dict[str, Node], attention: Node) -> _Chain | None:
    """What feeds `attention`, or None for another shape."""
    a, split = attention.attrs, producers.get(attention.inputs["v"])
    if "v_head_dim" in a or split is None or split.op != "split":
        return None
    chain, names = _Chain(split), [attention.inputs["q"], attention.inputs["k"]]
    heads = [a["num_heads"], a["num_kv_heads"]]
    makers = [producers.get(name) for name in names]
    if all(n and n.op == "rope" for n in makers):
        chain.ropes = [n for n in makers if n]
        names = [n.inputs["x"] for n in chain.ropes]
        makers = [producers.get(name) for name in names]
    if all(n and n.op == "rms_norm" for n in makers):
        chain.norms = [n for n in makers if n]
        names = [n.inputs["x"] for n in chain.norms]
    for part in (chain.ropes, chain.norms):
        if part and [n.attrs.get("num_heads") for n in part] != heads:
            return None
    same_ropes = not chain.ropes or (
        chain.ropes[0].attrs["rope"] == chain.ropes[1].attrs["rope"]
        and chain.ropes[0].inputs["positions"] == chain.ropes[1].inputs["positions"]
    )
    same_norms = not chain.norms or chain.norms[0].attrs["eps"] == chain.norms[1].attrs["eps"]
    in_order = split.outputs == (*names, attention.inputs["v"])
    return chain if same_ropes and same_norms and in_order else None
