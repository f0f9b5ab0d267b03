"""What every op means, in plain torch and float32: the oracle that backends, passes and models are tested against.

It computes a Graph node by node. Nothing here is fast, and nothing is rounded to the graph's dtypes on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as nnf
from torch import Tensor

from trtllm_cli.graph import Graph, Node
from trtllm_cli.kernels.quantization import dequantize, qdq, round_to
from trtllm_cli.kernels.rope import cos_sin_table
from trtllm_cli.kernels.rope_spec import RopeSpec

Inputs = Mapping[str, Tensor]


class Collectives(Protocol):
    """What the reference needs of other ranks."""

    def all_reduce(self, x: Tensor, group: Sequence[int]) -> Tensor:
        """The sum over the group."""
        ...

    def all_gather(self, x: Tensor, group: Sequence[int]) -> Tensor:
        """Side by side along the last dimension."""
        ...

    def send(self, x: Tensor, to: int) -> None:
        """Hands `x` on."""
        ...

    def recv(self, shape: Sequence[int], source: int) -> Tensor:
        """What `source` sent, of this shape."""
        ...


class Reference:
    """A graph with weights and a KV cache, computed op by op.

    `weights` are the checkpoint's tensors by name. The cache holds `num_slots` tokens for each attention layer.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, Tensor],
        *,
        num_slots: int,
        block_size: int,
        comm: Collectives | None = None,
    ) -> None:
        self.graph, self.block_size, self.comm = graph, block_size, comm
        self.weights = {
            name: _widen(torch.cat([weights[part] for part in w.parts])) for name, w in graph.weights.items()
        }
        self.caches: dict[int, tuple[Tensor, Tensor]] = {}
        self.num_slots = num_slots
        self.tables: dict[str, Tensor] = {}

    def step(self, inputs: Inputs) -> list[Tensor]:
        """One step over the batch that `inputs` (functional.STEP_INPUTS) describe; the graph's outputs."""
        values: dict[str, Tensor] = {**inputs, **self.weights}
        for node in self.graph.nodes:
            values.update(zip(node.outputs, self.compute(node, values), strict=True))
        return [values[name] for name in self.graph.outputs]

    def compute(self, node: Node, values: Mapping[str, Tensor]) -> list[Tensor]:
        """One node's outputs."""
        operands = {role: values[name] for role, name in node.inputs.items()}
        outputs = OPS[node.op](self, node, operands)
        if how := node.attrs.get("out_quant"):
            outputs[0] = qdq(outputs[0], operands.get("out_scale"), "fp8", node.attrs.get("out_group"))
            outputs += [outputs[0].new_full((1,), torch.nan)] if how == "token" else []  # values here have their steps
        return outputs

    def cache(self, node: Node) -> tuple[Tensor, Tensor]:
        """Keys [num_slots, num_kv_heads, head_dim] and values of an attention node's layer, float32.

        With `kv_quant` they are divided by their scales.
        """
        a = node.attrs
        if a["layer"] not in self.caches:
            shapes = [(self.num_slots, a["num_kv_heads"], d) for d in (a["head_dim"], v_head_dim(a))]
            self.caches[a["layer"]] = (torch.full(shapes[0], torch.nan), torch.full(shapes[1], torch.nan))
        return self.caches[a["layer"]]

    def rope_table(self, spec: dict[str, Any], length: int) -> Tensor:
        """The table of `kernels.rope.cos_sin_table`, grown to `length` positions."""
        key = repr(spec)
        if key not in self.tables or len(self.tables[key]) < length:
            self.tables[key] = cos_sin_table(RopeSpec.model_validate(spec), length)
        return self.tables[key]


def v_head_dim(attrs: Mapping[str, Any]) -> int:
    """The width of a value, of an attention node's attributes."""
    return int(attrs.get("v_head_dim", attrs["head_dim"]))


def kv_scales(inputs: Inputs) -> tuple[float, float]:
    """k's and v's of an attention node's operands, with `kv_quant`."""
    k, v = inputs["kv_scale"].tolist() if "kv_scale" in inputs else (1.0, 1.0)
    return k, v


def activate(x: Tensor, activation: str) -> Tensor:
    """One of model_config.Activation."""
    match activation:
        case "silu":
            return nnf.silu(x)
        case "gelu":
            return nnf.gelu(x)
        case "gelu_pytorch_tanh":
            return nnf.gelu(x, approximate="tanh")
        case "relu":
            return nnf.relu(x)
    raise AssertionError(activation)


def rms_norm(x: Tensor, weight: Tensor, eps: float, num_heads: int | None = None) -> Tensor:
    """functional.rms_norm."""
    parts = x.unflatten(-1, (num_heads, -1)) if num_heads else x
    y = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps) * weight
    return y.flatten(-2) if num_heads else y


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, num_heads: int | None = None) -> Tensor:
    """functional.layer_norm."""
    parts = x.unflatten(-1, (num_heads or 1, -1))
    centered = parts - parts.mean(-1, keepdim=True)
    y = (centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight
    return y if bias is None else y + bias


def gated_act(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """functional.gated_act."""
    if activation != "swiglu_oai":
        return activate(gate, activation) * up
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def route(
    logits: Tensor,
    bias: Tensor | None,
    *,
    top_k: int,
    scoring: str,
    renormalize: bool,
    scaling: float,
    num_groups: int | None = None,
    top_groups: int | None = None,
) -> tuple[Tensor, Tensor]:
    """functional.route."""
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    choice = scores if bias is None else scores + bias
    if num_groups is not None and top_groups is not None:
        groups = choice.unflatten(-1, (num_groups, -1))
        best = groups.amax(-1) if scoring == "softmax" else groups.topk(2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(best).scatter(1, _top(best, top_groups), 1.0).bool()
        choice = groups.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)
    ids = _top(choice, top_k)
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
    return weights * scaling, ids.int()


def _top(scores: Tensor, count: int) -> Tensor:
    """The `count` largest of each row, the first among equals."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def expert_linear(x: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None = None, first_expert: int = 0) -> Tensor:
    """functional.expert_linear, of a weight that is dequantized already."""
    top_k = ids.shape[1]
    parts = x.unflatten(-1, (-1, weight.shape[2])).expand(-1, top_k, -1)  # [num_tokens, top_k, in]
    out = x.new_zeros(*ids.shape, weight.shape[1])
    for expert, chosen in own_choices(ids, first_expert, len(weight)):
        out[chosen] = nnf.linear(parts[chosen], weight[expert], None if bias is None else bias[expert])
    return out.flatten(-2)


def own_choices(ids: Tensor, first_expert: int, num_experts: int) -> Iterator[tuple[int, Tensor]]:
    """Of the `num_experts` from `first_expert` on, each that is chosen, counted from 0, and where in `ids` it is."""
    local = ids - first_expert
    for expert in local.unique().tolist():
        if 0 <= expert < num_experts:
            yield expert, local == expert


def rope(x: Tensor, positions: Tensor, table: Tensor, num_heads: int, layout: str) -> Tensor:
    """functional.rope, with `table` from kernels.rope.cos_sin_table."""
    heads = x.unflatten(-1, (num_heads, -1))
    half = table.shape[1] // 2
    rows = table[positions.long()].unsqueeze(1)
    cos, sin = rows[..., :half], rows[..., half:]
    rotated, rest = heads[..., : 2 * half], heads[..., 2 * half :]
    if layout == "neox":
        a, b = rotated[..., :half], rotated[..., half:]
        y = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        y = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    return torch.cat([y, rest], dim=-1).flatten(-2)


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, inputs: Inputs, attrs: Mapping[str, Any], block_size: int
) -> Tensor:
    """Causal attention of q [num_tokens, num_heads * head_dim] over each sequence's slots of the caches.

    `inputs` are the step's, and `sinks` and `kv_scale` where the op has them.
    """
    k_scale, v_scale = kv_scales(inputs) if "kv_quant" in attrs else (1.0, 1.0)
    num_heads, num_kv_heads, window = attrs["num_heads"], attrs["num_kv_heads"], attrs.get("window")
    out = q.new_empty(len(q), num_heads * v_cache.shape[2])
    starts = inputs["query_start"].tolist()
    for s, length in enumerate(inputs["seq_lens"].tolist()):
        start, end = starts[s], starts[s + 1]
        positions = torch.arange(length, device=q.device)
        blocks = inputs["block_tables"][s].long()[positions // block_size]
        slots = blocks * block_size + positions % block_size
        repeats = num_heads // num_kv_heads
        keys = k_cache[slots].float().repeat_interleave(repeats, dim=1) * k_scale  # [length, num_heads, head_dim]
        values = v_cache[slots].float().repeat_interleave(repeats, dim=1) * v_scale
        queries = q[start:end].unflatten(-1, (num_heads, -1))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * attrs["scale"]
        if cap := attrs.get("softcap"):
            scores = cap * torch.tanh(scores / cap)
        distance = (length - (end - start) + torch.arange(end - start, device=q.device)).unsqueeze(1) - positions
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        scores = scores.masked_fill(hidden, -torch.inf)
        if "sinks" in inputs:
            sinks = inputs["sinks"][:, None, None].expand(-1, end - start, 1)
            weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        out[start:end] = torch.einsum("hqk,khd->qhd", weights, values).flatten(1)
    return out


def _widen(weight: Tensor) -> Tensor:
    return weight.float() if weight.is_floating_point() else weight


def _embedding(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    rows = t["ids"].long() - node.attrs.get("vocab_start", 0)
    known = (rows >= 0) & (rows < len(t["weight"]))
    return [t["weight"][rows.where(known, 0)] * known.unsqueeze(-1)]


def _plain(node: Node, t: dict[str, Tensor]) -> Tensor:
    """The weight of a linear or expert_linear, float32."""
    quant, group_size = node.attrs.get("quant"), node.attrs.get("group_size")
    return dequantize(t["weight"], quant, t.get("scale"), t.get("zero"), t.get("global_scale"), group_size)


def _linear(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    return [nnf.linear(t["x"], _plain(node, t), t.get("bias"))]


def _expert_linear(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    first = node.attrs.get("first_expert", 0)
    return [expert_linear(t["x"], t["ids"], _plain(node, t), t.get("bias"), first)]


def _head_linear(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    heads = node.attrs["num_heads"]
    weight = t["weight"].unflatten(0, (heads, -1))
    if node.attrs.get("transposed"):
        weight = weight.transpose(1, 2)
    return [torch.einsum("thi,hoi->tho", t["x"].unflatten(-1, (heads, -1)), weight).flatten(1)]


def _qdq(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    return [qdq(t["x"], t.get("scale"), node.attrs["fmt"], node.attrs.get("group_size"))]


def _quantize(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    return [t["x"]]


def _gather_columns(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    return [t["x"][:, t["indices"].long()]]


def _layer_norm(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    return [layer_norm(t["x"], t["weight"], t.get("bias"), node.attrs["eps"], node.attrs.get("num_heads"))]


def _mul(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    return [t["x"] * t["y"]]


def _scale(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    return [t["x"] * node.attrs["factor"]]


def _softcap(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    return [node.attrs["cap"] * torch.tanh(t["x"] / node.attrs["cap"])]


def _act(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    return [activate(t["x"], node.attrs["activation"])]


def _route(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    return list(route(t["logits"], t.get("bias"), **node.attrs))


def _expert_gated_act(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    parts = t["x"].unflatten(-1, (node.attrs["top_k"], -1))
    up, gate = parts.chunk(2, dim=-1)
    return [gated_act(gate, up, node.attrs["activation"]).flatten(-2)]


def _combine(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    weights = t["weights"]
    return [(t["x"].unflatten(-1, (weights.shape[1], -1)) * weights.unsqueeze(-1)).sum(1)]


def _rms_norm(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    return [rms_norm(t["x"], t["weight"], node.attrs["eps"], node.attrs.get("num_heads"))]


def _add_rms_norm(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    residual = t["residual"] + t["x"]
    return [rms_norm(residual, t["weight"], node.attrs["eps"]), residual]


def _add_layer_norm(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    residual = t["residual"] + t["x"]
    return [layer_norm(residual, t["weight"], t.get("bias"), node.attrs["eps"]), residual]


def _add(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    return [t["x"] + t["y"]]


def _gated_act(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    gate, up = t["x"].chunk(2, dim=-1) if "x" in t else (t["gate"], t["up"])
    return [gated_act(gate, up, node.attrs["activation"])]


def _split(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    return list(t["x"].split(node.attrs["sizes"], dim=-1))


def _concat(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    x, y = (t[role].unflatten(-1, (node.attrs["num_heads"], -1)) for role in ("x", "y"))
    return [torch.cat([x, y], dim=-1).flatten(-2)]


def _rope(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    spec = node.attrs["rope"]
    table = r.rope_table(spec, int(t["positions"].max()) + 1)
    return [rope(t["x"], t["positions"], table, node.attrs["num_heads"], spec["layout"])]


def _attention(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    _append(r, node, t, t["k"], t["v"])
    return _paged_attention(r, node, t)


def _append(r: Reference, node: Node, t: dict[str, Tensor], k: Tensor, v: Tensor) -> None:
    slots = t["slot_mapping"].long()
    for cache, new, scale in zip(r.cache(node), (k, v), kv_scales(t), strict=True):
        rows = new.unflatten(-1, (node.attrs["num_kv_heads"], -1))
        if fmt := node.attrs.get("kv_quant"):
            rows = round_to(rows / scale, fmt)
        cache[slots] = rows.to(cache.dtype)


def _rope_append(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    a = node.attrs
    kv_width = a["num_kv_heads"] * a["head_dim"]
    q, k, v = t["qkv"].split([a["num_heads"] * a["head_dim"], kv_width, kv_width], dim=-1)
    if "q_norm" in t:
        q = rms_norm(q, t["q_norm"], a["eps"], a["num_heads"])
        k = rms_norm(k, t["k_norm"], a["eps"], a["num_kv_heads"])
    if "rope" in a:
        table, layout = r.rope_table(a["rope"], int(t["positions"].max()) + 1), a["rope"]["layout"]
        q = rope(q, t["positions"], table, a["num_heads"], layout)
        k = rope(k, t["positions"], table, a["num_kv_heads"], layout)
    _append(r, node, t, k, v)
    return [q]


def _paged_attention(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    k_cache, v_cache = r.cache(node)
    q = t["q"]
    if "rows" not in t:
        return [paged_attention(q, k_cache, v_cache, t, node.attrs, r.block_size)]
    rows = t["rows"].long()  # of just these tokens
    whole = q.new_zeros(int(t["query_start"][-1]), q.shape[1])
    whole[rows] = q
    return [paged_attention(whole, k_cache, v_cache, t, node.attrs, r.block_size)[rows]]


def _gather_last(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    return [t["x"][t["indices"].long()]]


def _all_reduce(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    assert r.comm is not None
    return [r.comm.all_reduce(t["x"], node.attrs["group"])]


def _all_gather(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    assert r.comm is not None
    return [r.comm.all_gather(t["x"], node.attrs["group"])]


def _send(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    assert r.comm is not None
    r.comm.send(t["x"], node.attrs["to"])
    return []


def _recv(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    assert r.comm is not None
    width = r.graph.type_of(node.output).shape[-1]
    assert isinstance(width, int)
    return [r.comm.recv((t["like"].shape[0], width), node.attrs["source"])]


OPS: dict[str, Callable[[Reference, Node, dict[str, Tensor]], list[Tensor]]] = {
    "embedding": _embedding,
    "linear": _linear,
    "head_linear": _head_linear,
    "qdq": _qdq,
    "quantize": _quantize,
    "gather_columns": _gather_columns,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "add_rms_norm": _add_rms_norm,
    "add_layer_norm": _add_layer_norm,
    "add": _add,
    "mul": _mul,
    "scale": _scale,
    "softcap": _softcap,
    "act": _act,
    "route": _route,
    "expert_linear": _expert_linear,
    "expert_gated_act": _expert_gated_act,
    "combine": _combine,
    "gated_act": _gated_act,
    "split": _split,
    "concat": _concat,
    "rope": _rope,
    "attention": _attention,
    "rope_append": _rope_append,
    "paged_attention": _paged_attention,
    "gather_last": _gather_last,
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "send": _send,
    "recv": _recv,
}
