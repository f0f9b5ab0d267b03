"""Lowering to torch calls: the graph itself is the plan."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from trtllm_cli.build.backends.weights import FLOAT_BYTES, Lowering
from trtllm_cli.build.lowered import Packing, ReadWeight
from trtllm_cli.functional import NUM_LOGITS, NUM_TOKENS
from trtllm_cli.graph import Node
from trtllm_cli.kernels.linear_format import ROLES, LinearFormat
from trtllm_cli.tensor_file import TensorInfo


class TorchLowering(Lowering):
    """Weights are stored plainly, and torch packs int8 and int4 when they are loaded."""

    def lower(self) -> None:
        """Fills the packings."""
        self.formats: dict[str, dict[str, Any]] = {}
        for node in self.graph.nodes:
            if node.op == "embedding":
                self.add_table(node.inputs["weight"])
            elif node.op in ("linear", "expert_linear"):
                self._linear(node)
            elif node.op == "head_linear":
                self._plain_table(node.inputs["weight"])
            else:
                for name in node.inputs.values():
                    if name in self.graph.weights:
                        self.add_tensor(name)

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

    def _linear(self, node: Node) -> None:
        weight, fmt = node.inputs["weight"], self.format_of(node)
        self.formats[weight] = {**asdict(fmt), "in_features": self._in_features(node)}
        if "bias" in node.inputs:
            self.add_tensor(node.inputs["bias"])
        infos = self._infos(node, fmt)
        names = {role: weight + ("" if role == "weight" else f".{role}") + f".{fmt.name}" for role in infos}

        def make(read: ReadWeight) -> dict[str, torch.Tensor]:
            stored = self.read_format(node, read)
            parts = stored.parts
            if not stored.quantized and len(infos["weight"].shape) == 2:
                parts = stored.one()
            elif not stored.quantized:
                parts = {
                    role: torch.empty(info.shape, dtype=getattr(torch, info.dtype)) for role, info in infos.items()
                }
                for i in range(len(parts["weight"])):
                    for role, tensor in stored.one(i).items():
                        parts[role][i] = tensor
            return {names[role]: tensor for role, tensor in parts.items()}

        if names["weight"] not in self._packed:
            self._packed.add(names["weight"])
            self.packings.append(Packing({names[role]: info for role, info in infos.items()}, make))

    def _plain_table(self, weight: str) -> None:
        """What the reference multiplies by: float32 in a float32 engine, else bfloat16."""
        dtype = "float32" if self.build_config.weight_dtype == "float32" else "bfloat16"
        shape = self.graph.weights[weight].shape
        self.add(weight, TensorInfo(dtype, shape), lambda read: read(weight).to(getattr(torch, dtype)))

    def _infos(self, node: Node, fmt: LinearFormat) -> dict[str, TensorInfo]:
        """A linear's tensors in the engine, by role: the checkpoint's where that quantized it."""
        if "quant" in node.attrs:
            stored = {role: self.graph.weights[node.inputs[role]] for role in ROLES if role in node.inputs}
            return {role: TensorInfo(w.dtype, w.shape) for role, w in stored.items()}
        *lead, rows, columns = self.graph.weights[node.inputs["weight"]].shape
        groups = () if fmt.group_size is None else (-(-columns // fmt.group_size),)
        scale = TensorInfo("float32", (*lead, rows, *groups))
        match fmt.name:
            case "int8":
                return {"weight": TensorInfo("int8", (*lead, rows, columns)), "scale": scale}
            case "int4":
                return {"weight": TensorInfo("uint8", (*lead, rows, -(-columns // 2))), "scale": scale, "zero": scale}
        return {"weight": TensorInfo(fmt.name, (*lead, rows, columns))}
