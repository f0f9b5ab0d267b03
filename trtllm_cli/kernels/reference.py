"""What every op means, in plain torch and float32: the oracle that backends, passes and models are tested against.

It computes a Graph node by node. Nothing here is fast, and nothing is rounded to the graph's dtypes on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as nnf
from torch import Tensor

from trtllm_cli.graph import Graph, Node
from trtllm_cli.kernels.quantization import dequantize_int4, dequantize_int8
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
        return _OPS[node.op](self, node, {role: values[name] for role, name in node.inputs.items()})

    def cache(self, layer: int, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, float32 [num_slots, num_kv_heads, head_dim] each."""
        if layer not in self.caches:
            shape = (self.num_slots, num_kv_heads, head_dim)
            self.caches[layer] = (torch.full(shape, torch.nan), torch.full(shape, torch.nan))
        return self.caches[layer]

    def rope_table(self, spec: dict[str, Any], length: int) -> Tensor:
        """The table of `kernels.rope.cos_sin_table`, grown to `length` positions."""
        key = repr(spec)
        if key not in self.tables or len(self.tables[key]) < length:
            self.tables[key] = cos_sin_table(RopeSpec.model_validate(spec), length)
        return self.tables[key]


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


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    quant: str | None = None,
    group_size: int | None = None,
) -> Tensor:
    """functional.linear."""
    if quant == "int8":
        assert scale is not None
        weight = dequantize_int8(weight, scale)
    elif quant == "int4":
        assert scale is not None
        assert group_size is not None
        weight = dequantize_int4(weight, scale, zero if zero is not None else torch.full_like(scale, 8.0))
    return nnf.linear(x, weight, bias)


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
    """Causal attention of q [num_tokens, num_heads * head_dim] over each sequence's slots of the caches."""
    num_heads, num_kv_heads, window = attrs["num_heads"], attrs["num_kv_heads"], attrs.get("window")
    out = torch.empty_like(q)
    starts = inputs["query_start"].tolist()
    for s, length in enumerate(inputs["seq_lens"].tolist()):
        start, end = starts[s], starts[s + 1]
        positions = torch.arange(length)
        blocks = inputs["block_tables"][s].long()[positions // block_size]
        slots = blocks * block_size + positions % block_size
        repeats = num_heads // num_kv_heads
        keys = k_cache[slots].float().repeat_interleave(repeats, dim=1)  # [length, num_heads, head_dim]
        values = v_cache[slots].float().repeat_interleave(repeats, dim=1)
        queries = q[start:end].unflatten(-1, (num_heads, -1))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * attrs["scale"]
        distance = (length - (end - start) + torch.arange(end - start)).unsqueeze(1) - positions
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[start:end] = torch.einsum("hqk,khd->qhd", weights, values).flatten(1)
    return out


def _widen(weight: Tensor) -> Tensor:
    return weight.float() if weight.is_floating_point() else weight


def _embedding(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    rows = t["ids"].long() - node.attrs.get("vocab_start", 0)
    known = (rows >= 0) & (rows < len(t["weight"]))
    return [t["weight"][rows.where(known, 0)] * known.unsqueeze(-1)]


def _linear(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    quant, group_size = node.attrs.get("quant"), node.attrs.get("group_size")
    return [linear(t["x"], t["weight"], t.get("bias"), t.get("scale"), t.get("zero"), quant, group_size)]


def _rms_norm(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    return [rms_norm(t["x"], t["weight"], node.attrs["eps"], node.attrs.get("num_heads"))]


def _add_rms_norm(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    residual = t["residual"] + t["x"]
    return [rms_norm(residual, t["weight"], node.attrs["eps"]), residual]


def _add(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    return [t["x"] + t["y"]]


def _gated_act(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    gate, up = t["x"].chunk(2, dim=-1) if "x" in t else (t["gate"], t["up"])
    return [activate(gate, node.attrs["activation"]) * up]


def _split(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    return list(t["x"].split(node.attrs["sizes"], dim=-1))


def _rope(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    spec = node.attrs["rope"]
    table = r.rope_table(spec, int(t["positions"].max()) + 1)
    return [rope(t["x"], t["positions"], table, node.attrs["num_heads"], spec["layout"])]


def _attention(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    _append(r, node, t, t["k"], t["v"])
    return _paged_attention(r, node, t)


def _append(r: Reference, node: Node, t: dict[str, Tensor], k: Tensor, v: Tensor) -> None:
    a = node.attrs
    k_cache, v_cache = r.cache(a["layer"], a["num_kv_heads"], a["head_dim"])
    slots = t["slot_mapping"].long()
    k_cache[slots] = k.unflatten(-1, (a["num_kv_heads"], -1)).to(k_cache.dtype)
    v_cache[slots] = v.unflatten(-1, (a["num_kv_heads"], -1)).to(v_cache.dtype)


def _rope_append(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    a = node.attrs
    kv_width = a["num_kv_heads"] * a["head_dim"]
    q, k, v = t["qkv"].split([a["num_heads"] * a["head_dim"], kv_width, kv_width], dim=-1)
    if "q_norm" in t:
        q = rms_norm(q, t["q_norm"], a["eps"], a["num_heads"])
        k = rms_norm(k, t["k_norm"], a["eps"], a["num_kv_heads"])
    table = r.rope_table(a["rope"], int(t["positions"].max()) + 1)
    k = rope(k, t["positions"], table, a["num_kv_heads"], a["rope"]["layout"])
    _append(r, node, t, k, v)
    return [rope(q, t["positions"], table, a["num_heads"], a["rope"]["layout"])]


def _paged_attention(r: Reference, node: Node, t: dict[str, Tensor]) -> list[Tensor]:
    a = node.attrs
    k_cache, v_cache = r.cache(a["layer"], a["num_kv_heads"], a["head_dim"])
    return [paged_attention(t["q"], k_cache, v_cache, t, a, r.block_size)]


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


_OPS: dict[str, Callable[[Reference, Node, dict[str, Tensor]], list[Tensor]]] = {
    "embedding": _embedding,
    "linear": _linear,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "add": _add,
    "gated_act": _gated_act,
    "split": _split,
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
