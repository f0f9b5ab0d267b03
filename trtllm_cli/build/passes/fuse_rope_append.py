"""Joins everything between the qkv projection and attention: split, q/k norm, rotary positions, the cache's append."""

from __future__ import annotations

from trtllm_cli.graph import Graph, Node


def fuse_rope_append(graph: Graph) -> Graph:
    """`split, rms_norm of q and k if any, rope, attention` becomes `q = rope_append(qkv), paged_attention(q)`."""
    producers = graph.producers()
    replaced: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if node.op != "attention":
            continue
        chain = _chain(producers, node)
        if chain is None:
            continue
        split, q_rope, k_rope, norms = chain
        a = node.attrs
        attrs = {key: a[key] for key in ("layer", "num_heads", "num_kv_heads", "head_dim")}
        attrs["rope"] = q_rope.attrs["rope"]
        inputs = {
            "qkv": split.inputs["x"],
            "positions": q_rope.inputs["positions"],
            "slot_mapping": node.inputs["slot_mapping"],
        }
        if norms:
            inputs["q_norm"], inputs["k_norm"] = (n.inputs["weight"] for n in norms)
            attrs["eps"] = norms[0].attrs["eps"]
        for old in (split, q_rope, k_rope, *norms):
            replaced[id(old)] = []
        reads = {k: v for k, v in node.inputs.items() if k not in ("k", "v", "slot_mapping")}
        replaced[id(node)] = [
            Node("rope_append", inputs, (q_rope.output,), attrs),
            Node("paged_attention", reads, node.outputs, a),
        ]
    return graph.with_nodes([new for node in graph.nodes for new in replaced.get(id(node), [node])])


def _chain(producers: dict[str, Node], attention: Node) -> tuple[Node, Node, Node, tuple[Node, ...]] | None:
    """The split, the two ropes and the norms (q's, k's, or none) that feed `attention`, or None for another shape."""
    q_rope, k_rope = producers.get(attention.inputs["q"]), producers.get(attention.inputs["k"])
    split = producers.get(attention.inputs["v"])
    if not (q_rope and k_rope and split and q_rope.op == k_rope.op == "rope" and split.op == "split"):
        return None
    q_from, k_from = producers.get(q_rope.inputs["x"]), producers.get(k_rope.inputs["x"])
    norms: tuple[Node, ...] = ()
    if q_from and k_from and q_from.op == k_from.op == "rms_norm" and q_from.attrs["eps"] == k_from.attrs["eps"]:
        norms = (q_from, k_from)
        q_from, k_from = (producers.get(n.inputs["x"]) for n in norms)
    if not (q_from is k_from is split) or q_rope.attrs["rope"] != k_rope.attrs["rope"]:
        return None
    heads = [attention.inputs["q"], attention.inputs["k"], attention.inputs["v"]]
    return (split, q_rope, k_rope, norms) if len(split.outputs) == len(set(heads)) == 3 else None
