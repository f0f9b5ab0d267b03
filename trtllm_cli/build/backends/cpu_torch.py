"""Lowering to torch calls: the graph itself is the plan."""

from __future__ import annotations

from typing import Any

import torch

from trtllm_cli.build.backends.cpu_weights import FLOAT_BYTES, Lowering
from trtllm_cli.build.lowered import Packing, ReadWeight
from trtllm_cli.functional import NUM_LOGITS, NUM_TOKENS
from trtllm_cli.graph import Node
from trtllm_cli.kernels.quantization import quantize_int4, quantize_int8
from trtllm_cli.tensor_file import TensorInfo


class TorchLowering(Lowering):
    """Weights are stored plainly, and torch packs int8 and int4 when they are loaded."""

    def lower(self) -> None:
        """Fills the packings."""
        self.formats: dict[str, str] = {}
        linears = {node.inputs["weight"]: node for node in self.graph.nodes if node.op == "linear"}
        for node in self.graph.nodes:
            if node.op == "embedding":
                self.add_table(node.inputs["weight"])
            elif node.op == "linear":
                self._linear(node)
            for name in node.inputs.values():
                if name in self.graph.weights and name not in linears and node.op not in ("embedding", "linear"):
                    self._add_plain(name)

    def plan(self) -> dict[str, Any]:
        """The torch part of the plan; `steps` counts nodes for the report."""
        return {"formats": self.formats, "steps": [node.op for node in self.graph.nodes]}

    def target(self) -> dict[str, str]:
        """torch runs wherever it is installed."""
        return {"arch": "any", "kernels": "torch", "features": ""}

    def activation_bytes(self) -> int:
        """Bytes of the buffers that a plan with reuse would need; torch allocates about as much."""
        sizes = {NUM_TOKENS: self.build_config.max_num_tokens, NUM_LOGITS: self.build_config.max_batch_size}
        return 2 * max(sizes[str(t.shape[0])] * int(t.shape[-1]) for t in self.graph.tensors.values()) * FLOAT_BYTES

    def _add_plain(self, name: str) -> None:
        """An operand as the checkpoint has it: experts, heads, what is quantized; vectors in float32."""
        weight = self.graph.weights[name]
        dtype = "float32" if len(weight.shape) == 1 and weight.dtype in ("float16", "bfloat16") else weight.dtype
        self.add(name, TensorInfo(dtype, weight.shape), lambda read: read(name).to(getattr(torch, dtype)))

    def _linear(self, node: Node) -> None:
        weight, fmt = node.inputs["weight"], self.format_of(node)
        self.formats[weight] = fmt
        if "bias" in node.inputs:
            self.add_vector(node.inputs["bias"])
        rows = int(self.graph.weights[weight].shape[0])
        columns = int(self.graph.type_of(node.inputs["x"]).shape[-1])
        if fmt in ("float32", "bfloat16"):
            dtype = getattr(torch, fmt)
            self.add(f"{weight}.{fmt}", TensorInfo(fmt, (rows, columns)), lambda read: read(weight).to(dtype))
            return
        group_size = node.attrs.get("group_size") or self.build_config.group_size or columns
        shapes = {"weight": TensorInfo("int8", (rows, columns)), "scale": TensorInfo("float32", (rows,))}
        if fmt == "int4":
            groups = TensorInfo("float32", (rows, -(-columns // group_size)))
            shapes = {"weight": TensorInfo("uint8", (rows, -(-columns // 2))), "scale": groups, "zero": groups}
        names = {role: weight + ("" if role == "weight" else f".{role}") + f".{fmt}" for role in shapes}

        def make(read: ReadWeight) -> dict[str, torch.Tensor]:
            if node.attrs.get("quant"):
                parts = [read(node.inputs[role]) for role in ("weight", "scale")]
                if fmt == "int4":
                    parts.append(read(node.inputs["zero"]) if "zero" in node.inputs else torch.full_like(parts[1], 8.0))
            else:
                parts = list(quantize_int8(read(weight)) if fmt == "int8" else quantize_int4(read(weight), group_size))
            return dict(zip(names.values(), parts, strict=True))

        if names["weight"] not in self._packed:
            self._packed.add(names["weight"])
            self.packings.append(Packing({names[role]: info for role, info in shapes.items()}, make))
