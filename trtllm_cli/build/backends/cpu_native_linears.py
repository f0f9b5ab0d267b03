"""Lowering of what multiplies by a packed weight, and of what stands around it: rounding, columns, experts."""

from __future__ import annotations

from typing import Any

import torch

from trtllm_cli.build.backends.cpu_native_steps import NativeSteps
from trtllm_cli.build.lowered import Packing, ReadWeight
from trtllm_cli.graph import Node
from trtllm_cli.kernels.cpu import pack
from trtllm_cli.tensor_file import TensorInfo


class LinearSteps(NativeSteps):
    """Linears of each format, alone, by head and by expert."""

    def _linear(self, node: Node) -> None:
        self._step(
            "linear",
            x=self._buffer(node.inputs["x"]),
            out=self._buffer(node.output),
            bias=self.add_tensor(node.inputs["bias"]) if "bias" in node.inputs else None,
            rows=self._rows(node.output),
            **self._packed_weight(node, self._width(node.output), self._width(node.inputs["x"])),
        )

    def _head_linear(self, node: Node) -> None:
        heads = node.attrs["num_heads"]
        out_features, in_features = self._width(node.output) // heads, self._width(node.inputs["x"]) // heads
        self._step(
            "linear",
            x=self._buffer(node.inputs["x"]),
            out=self._buffer(node.output),
            stack=heads,
            rows=self._rows(node.output),
            **self._packed_weight(node, out_features, in_features, heads),
        )

    def _expert_linear(self, node: Node) -> None:
        top_k = self._width(node.inputs["ids"])
        experts, _, _ = self.graph.weights[node.inputs["weight"]].shape
        out_features, in_features = self._width(node.output) // top_k, self._in_features(node)
        self._step(
            "expert_linear",
            x=self._buffer(node.inputs["x"]),
            ids=self._buffer(node.inputs["ids"]),
            out=self._buffer(node.output),
            bias=self.add_tensor(node.inputs["bias"]) if "bias" in node.inputs else None,
            num_experts=experts,
            top_k=top_k,
            x_per_choice=self._width(node.inputs["x"]) != in_features,
            first_expert=node.attrs.get("first_expert", 0),
            rows=self._rows(node.output),
            **self._packed_weight(node, out_features, in_features, experts),
        )

    def _packed_weight(
        self, node: Node, out_features: int, in_features: int, stack: int | None = None
    ) -> dict[str, Any]:
        """The arguments of a step that are about its weight; the weight is packed, one of a stack after another."""
        fmt, weight = self.format_of(node), node.inputs["weight"]
        lead = () if stack is None else (stack,)
        infos = {
            role: TensorInfo(info.dtype, (*lead, *info.shape))
            for role, info in pack.packed_infos(fmt, out_features, in_features).items()
        }
        names = {role: weight + ("" if role == "weight" else f".{role}") + f".{fmt.name}" for role in infos}

        def make(read: ReadWeight) -> dict[str, torch.Tensor]:
            stored = self.read_format(node, read)
            if stack is None:
                made = pack.pack(fmt, stored.one(), in_features)
                return {names[role]: tensor for role, tensor in made.items()}
            packed = {role: torch.empty(info.shape, dtype=getattr(torch, info.dtype)) for role, info in infos.items()}
            for i in range(stack):
                for role, tensor in pack.pack(fmt, stored.one(i), in_features).items():
                    packed[role][i] = tensor
            return {names[role]: tensor for role, tensor in packed.items()}

        if names["weight"] not in self._packed:
            self._packed.add(names["weight"])
            self.packings.append(Packing({names[role]: info for role, info in infos.items()}, make))
        return {
            "weight": f"w:{names['weight']}",
            "scale": f"w:{names['scale']}" if "scale" in names else None,
            "in_features": in_features,
            "out_features": out_features,
            **pack.step_arguments(fmt),
        }

    def _qdq(self, node: Node) -> None:
        self._step(
            "qdq",
            x=self._buffer(node.inputs["x"]),
            out=self._buffer(node.output),
            scale=self._largest(node.inputs["scale"]) if "scale" in node.inputs else None,
            width=self._width(node.output),
            fmt=node.attrs["fmt"],
            group_size=node.attrs.get("group_size"),
            rows=self._rows(node.output),
        )

    def _largest(self, weight: str) -> str:
        """The one step of a qdq."""
        info = TensorInfo("float32", (1,))
        return self.add(f"{weight}.largest", info, lambda read: read(weight).float().amax().reshape(1))

    def _gather_columns(self, node: Node) -> None:
        self._step(
            "gather_columns",
            x=self._buffer(node.inputs["x"]),
            out=self._buffer(node.output),
            indices=self.add_tensor(node.inputs["indices"]),
            width=self._width(node.output),
            x_stride=self._width(node.inputs["x"]),
            rows=self._rows(node.output),
        )

    def _route(self, node: Node) -> None:
        weights, ids = node.outputs
        self._step(
            "route",
            logits=self._buffer(node.inputs["logits"]),
            weights=self._buffer(weights),
            ids=self._buffer(ids),
            bias=self.add_tensor(node.inputs["bias"]) if "bias" in node.inputs else None,
            num_experts=self._width(node.inputs["logits"]),
            rows=self._rows(ids),
            **node.attrs,
        )

    def _expert_gated_act(self, node: Node) -> None:
        self._step(
            "expert_gated_act",
            x=self._buffer(node.inputs["x"]),
            out=self._buffer(node.output),
            width=self._width(node.output),
            top_k=node.attrs["top_k"],
            activation=node.attrs["activation"],
            rows=self._rows(node.output),
        )

    def _combine(self, node: Node) -> None:
        self._step(
            "combine",
            x=self._buffer(node.inputs["x"]),
            weights=self._buffer(node.inputs["weights"]),
            out=self._buffer(node.output),
            width=self._width(node.output),
            top_k=self._width(node.inputs["weights"]),
            rows=self._rows(node.output),
        )
