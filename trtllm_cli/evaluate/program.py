"""A traced model over whole sequences, in torch: what evaluation and calibration run.

The graph is that of one rank alone, before the build's passes. Each linear's weight is in a module of its own, so that
hooks and nvidia-modelopt find it. Modules are nested as the checkpoint names them: `named_modules()` gives
"transformer.layers.0.attention.qkv", and so does `Program.linears`.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from trtllm_cli.evaluate.graph_parts import Linear, Step, cut, layer_outputs, linears
from trtllm_cli.graph import Graph, Node
from trtllm_cli.kernels.quantization import dequantize, round_to
from trtllm_cli.kernels.reference import Reference, expert_linear, paged_attention, v_head_dim

Weights = Callable[[str], Tensor]  # a checkpoint's tensor by its name, as the graph declares it
OnOutput = Callable[[str, Tensor], None]  # told of each tensor of the graph, [batch * length, width]

_MOVES = ("embedding", "split", "gather_columns")  # ops that only copy: nothing to widen


class ExpertLinear(nn.Module):
    """functional.expert_linear with its weight [experts, out, in], and perhaps a bias [experts, out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """`x` [tokens, in] or [tokens, top_k * in], `ids` [tokens, top_k], to [tokens, top_k * out]."""
        return expert_linear(x, ids, self.weight, self.bias)


class Program(nn.Module):
    """A graph with weights, computed in `dtype`; norms, activations and routing in float32, then rounded to it.

    `weights` is asked for each of the checkpoint's tensors once. Quantized weights are dequantized at once; the
    rounding of activations that goes with them stays. A tied head's module has the embedding's memory: it must not be
    altered. Raises UnsupportedError for a graph of one rank of several.
    """

    def __init__(
        self, graph: Graph, weights: Weights, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__()
        self.graph, self.dtype, self.device = graph, dtype, torch.device(device)
        self._parts = cut(graph)
        self.layers: dict[str, Linear] = linears(graph)  # linears and the experts', by their modules' names
        self._module_of = {linear.node.output: name for name, linear in self.layers.items()}
        self._ops = _Ops(graph, self.device)
        self._load(weights)

    def forward(self, ids: Tensor) -> Tensor:
        """float32 logits [batch, length, vocab] of `ids`, int64 [batch, length]."""
        return self.head(self.hidden(ids))

    def hidden(self, ids: Tensor, on_output: OnOutput | None = None) -> Tensor:
        """The last layer's output [batch, length, hidden_size] of `ids`, int64 [batch, length].

        `on_output` is told each tensor's name in the graph and its value as it is made; see `layer_outputs`.
        """
        batch, length = ids.shape
        positions = torch.arange(length, device=self.device).repeat(batch)
        inputs = {"input_ids": ids.to(self.device).flatten(), "positions": positions}
        values = self._run(self._parts.body, inputs, (batch, length), self.dtype, on_output)
        return values[self._parts.hidden].unflatten(0, (batch, length))

    def head(self, hidden: Tensor, on_output: OnOutput | None = None) -> Tensor:
        """float32 logits [..., vocab] of `hidden` [..., hidden_size]; of a slice of it, to bound memory."""
        rows = hidden.flatten(0, -2)
        if on_output is not None:
            on_output(self._parts.selected, rows)
        values = self._run(self._parts.head, {self._parts.selected: rows}, (1, len(rows)), torch.float32, on_output)
        return values[self.graph.outputs[0]].unflatten(0, hidden.shape[:-1])

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        width = self.graph.type_of(self.graph.outputs[0]).shape[-1]
        assert isinstance(width, int)
        return width

    def feed(self, module: str, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """What one linear makes of `x` [tokens, in], its reordering, scaling and rounding of the input included.

        `ids` are the tokens' experts, for the experts' linears.
        """
        linear = self.layers[module]
        given = {linear.root: x.to(self.device, self.dtype)}
        if linear.experts is not None:
            assert ids is not None
            given[linear.experts] = ids.to(self.device)
        steps = [Step(node, ()) for node in (*linear.prepare, linear.node)]
        return self._run(steps, given, (1, len(x)), self.dtype, None)[linear.node.output]

    @property
    def linears(self) -> dict[str, nn.Module]:
        """The module of each linear by its name in the whole model, in order; looked up as they are now."""
        return self._modules_with("linear")

    @property
    def expert_linears(self) -> dict[str, nn.Module]:
        """The same of the experts' linears."""
        return self._modules_with("expert_linear")

    @property
    def layer_outputs(self) -> dict[int, str]:
        """Decoder layer -> the graph's tensor that is the residual stream after it."""
        return layer_outputs(self.graph, self._parts.hidden)

    def _modules_with(self, op: str) -> dict[str, nn.Module]:
        return {name: self.get_submodule(name) for name, linear in self.layers.items() if linear.node.op == op}

    def _load(self, weights: Weights) -> None:
        """Makes the modules: linears, then buffers for the rest."""
        loader = _Loader(self.graph, weights, self.dtype, self.device)
        for node in self.graph.nodes:
            if node.op in ("linear", "expert_linear"):
                parent, _, last = self._module_of[node.output].rpartition(".")
                self._container(parent).add_module(last, loader.linear(node))
        for name in self.graph.weights:
            if name not in loader.used:
                parent, _, last = name.rpartition(".")
                self._container(parent).register_buffer(last, loader.plain(name))

    def _container(self, path: str) -> nn.Module:
        """The module at `path`, made where there is none."""
        module: nn.Module = self
        for part in path.split(".") if path else ():
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        return module

    def _run(
        self,
        steps: list[Step],
        inputs: Mapping[str, Tensor],
        shape: tuple[int, int],
        dtype: torch.dtype,
        on_output: OnOutput | None,
    ) -> dict[str, Tensor]:
        """What is left after the steps, of which each rounds to `dtype`; `shape` is (batch, length)."""
        made = dict(inputs)
        values = ChainMap(made, dict(self.named_buffers(remove_duplicate=False)))
        for step in steps:
            outputs = self._compute(step.node, values, shape)
            if step.node.op != "route":
                outputs = [y.to(dtype) if y.is_floating_point() else y for y in outputs]
            made.update(zip(step.node.outputs, outputs, strict=True))
            if on_output is not None:
                for name, value in zip(step.node.outputs, outputs, strict=True):
                    on_output(name, value)
            for name in step.dead:
                made.pop(name, None)
        return made

    def _compute(self, node: Node, values: Mapping[str, Tensor], shape: tuple[int, int]) -> list[Tensor]:
        operands = {role: values[name] for role, name in node.inputs.items() if name in values}
        if node.op in ("linear", "expert_linear"):
            module, x = self.get_submodule(self._module_of[node.output]), operands["x"].to(self.dtype)
            return [module(x, operands["ids"]) if node.op == "expert_linear" else module(x)]
        if node.op not in _MOVES:
            operands = {role: t.float() if t.is_floating_point() else t for role, t in operands.items()}
        if node.op == "attention":
            return [_attention(node.attrs, operands, *shape, self.dtype)]
        return self._ops.compute(node, {name: operands[role] for role, name in node.inputs.items()})


class _Loader:
    """Weights of a graph in the dtype and place where they are computed with."""

    def __init__(self, graph: Graph, weights: Weights, dtype: torch.dtype, device: torch.device) -> None:
        self._graph, self._weights, self._dtype, self._device = graph, weights, dtype, device
        self._readers = graph.consumers()
        self._plain: dict[str, Tensor] = {}
        self.used: set[str] = set()  # weights that only a linear reads, and that are in its module

    def plain(self, name: str) -> Tensor:
        """A weight as it is: vectors in float32, what is larger in the program's dtype, integers as they are."""
        if name not in self._plain:
            value = self._stored(name)
            if value.is_floating_point():
                value = value.to(self._dtype if value.ndim > 1 else torch.float32)
            self._plain[name] = value.to(self._device)
        return self._plain[name]

    def linear(self, node: Node) -> nn.Module:
        """The module of a linear or expert_linear."""
        held = {role: name for role, name in node.inputs.items() if name in self._graph.weights}
        name, bias = held["weight"], None
        shared = len(self._readers[name]) > 1
        if "bias" in held:
            bias = self._stored(held["bias"]).to(self._device, self._dtype)
        if shared and not node.attrs.get("quant"):
            weight = self.plain(name)
            del held["weight"]
        else:
            weight = self._dequantized(node, held)
        self.used.update(held.values())
        if node.op == "expert_linear":
            return ExpertLinear(weight, bias)
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        module.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            module.bias = nn.Parameter(bias, requires_grad=False)
        return module

    def _dequantized(self, node: Node, held: Mapping[str, str]) -> Tensor:
        quant, group_size = node.attrs.get("quant"), node.attrs.get("group_size")
        weight = self._stored(held["weight"])
        if quant is None:
            return weight.to(self._device, self._dtype)
        operands = {role: self._stored(held[role]) for role in ("scale", "zero", "global_scale") if role in held}
        return dequantize(weight, quant, **operands, group_size=group_size).to(self._dtype).to(self._device)

    def _stored(self, name: str) -> Tensor:
        parts = [self._weights(part) for part in self._graph.weights[name].parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Ops(Reference):
    """What the ops mean, with their tables on a device; it holds no weights and no cache."""

    def __init__(self, graph: Graph, device: torch.device) -> None:
        super().__init__(replace(graph, weights={}), {}, num_slots=0, block_size=1)
        self._device = device

    def rope_table(self, spec: dict[str, Any], length: int) -> Tensor:
        table = super().rope_table(spec, length).to(self._device)
        self.tables[repr(spec)] = table
        return table


def _attention(a: Mapping[str, Any], t: Mapping[str, Tensor], batch: int, length: int, dtype: torch.dtype) -> Tensor:
    """functional.attention [batch * length, ...] of sequences that begin here; `t` in float32."""
    q = t["q"].unflatten(-1, (a["num_heads"], -1))
    k, v = (t[role].unflatten(-1, (a["num_kv_heads"], -1)) for role in ("k", "v"))
    if fmt := a.get("kv_quant"):
        k, v = (round_to(x / scale, fmt) * scale for x, scale in zip((k, v), t["kv_scale"], strict=True))
    if a.get("softcap") or "sinks" in t:
        return torch.cat([
            _one_sequence(a, t, *(x[start : start + length] for x in (q, k, v)))
            for start in range(0, batch * length, length)
        ])  # fmt: skip
    q, k, v = (x.to(dtype).unflatten(0, (batch, length)).transpose(1, 2) for x in (q, k, v))
    window, mask = a.get("window"), None
    if window is not None and window < length:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
    grouped = a["num_heads"] != a["num_kv_heads"]
    y = nnf.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=a["scale"], enable_gqa=grouped
    )
    return y.transpose(1, 2).reshape(batch * length, a["num_heads"] * v_head_dim(a))


def _one_sequence(a: Mapping[str, Any], t: Mapping[str, Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with soft cap or sinks, by the reference: the sequence is the only block of a cache."""
    inputs = {
        "query_start": torch.tensor([0, len(q)]),
        "seq_lens": torch.tensor([len(q)]),
        "block_tables": torch.zeros(1, 1, dtype=torch.int64, device=q.device),
        **({"sinks": t["sinks"]} if "sinks" in t else {}),
    }
    return paged_attention(q.flatten(1), k, v, inputs, a, len(q))
