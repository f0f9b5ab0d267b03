"""Lowering to our C++ kernels: each node of the graph becomes one step.

A native plan is the list of `kernels.cpu.library` steps by name and argument. Arguments that are addresses at run time
are strings here: "b:N" a buffer, "w:NAME" a tensor of the engine, "kv:N" a layer's KV cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trtllm_cli.build.backends.cpu_weights import FLOAT_BYTES, Lowering
from trtllm_cli.build.lowered import Packing, ReadWeight
from trtllm_cli.build.passes.plan_buffers import BufferPlan, plan_buffers
from trtllm_cli.engine import KERNELS
from trtllm_cli.errors import UnsupportedError
from trtllm_cli.functional import NUM_LOGITS, NUM_TOKENS
from trtllm_cli.graph import Node
from trtllm_cli.kernels.cpu import compiler, pack
from trtllm_cli.tensor_file import TensorInfo


class NativeLowering(Lowering):
    """Each node as one step of the compiled library."""

    def lower(self) -> None:
        """Fills the steps and the packings."""
        self.buffers: BufferPlan = plan_buffers(self.graph)
        self.steps: list[dict[str, Any]] = []
        features = compiler.host_features()
        image = compiler.compile_library(features)
        self.features = features
        blob = torch.frombuffer(bytearray(image), dtype=torch.uint8)
        self.add(KERNELS, TensorInfo("uint8", (len(image),)), lambda _: blob)
        if op := self.unsupported():
            raise UnsupportedError(
                f"the native kernels have no {op}", fix="build with --kernels torch, which runs any graph"
            )
        for node in self.graph.nodes:
            getattr(self, f"_{node.op}")(node)

    def unsupported(self) -> str:
        """The first node that the native kernels cannot compute, in words; empty when they have all."""
        for node in self.graph.nodes:
            if not hasattr(self, f"_{node.op}"):
                return f"`{node.op}` in this place of the graph"
            if node.op == "gated_act" and "x" not in node.inputs:
                return "`gated_act` of two tensors that could not be merged into one linear"
        return ""

    def plan(self) -> dict[str, Any]:
        """The native part of the plan."""
        return {
            "buffers": [{"rows": b.rows, "width": b.width} for b in self.buffers.buffers],
            "steps": self.steps,
            "output": self._buffer(self.graph.outputs[0]) if self.graph.outputs else None,
            "output_width": self.graph.type_of(self.graph.outputs[0]).shape[-1] if self.graph.outputs else 0,
        }

    def target(self) -> dict[str, str]:
        """What the kernels were compiled for."""
        return {"arch": compiler.host_arch(), "kernels": "native", "features": " ".join(self.features)}

    def activation_bytes(self) -> int:
        """Bytes of the buffers at the engine's limits."""
        sizes = {NUM_TOKENS: self.build_config.max_num_tokens, NUM_LOGITS: self.build_config.max_batch_size}
        return self.buffers.elements(sizes) * FLOAT_BYTES

    def _buffer(self, tensor: str) -> str:
        return f"b:{self.buffers.of[tensor]}"

    def _operand(self, name: str) -> str:
        """An activation, or a vector among the weights."""
        return self.add_vector(name) if name in self.graph.weights else self._buffer(name)

    def _step(self, op: str, **args: Any) -> None:
        self.steps.append({"op": op, "args": {k: v for k, v in args.items() if v is not None}})

    def _rows(self, tensor: str) -> str:
        return str(self.graph.type_of(tensor).shape[0])

    def _width(self, tensor: str) -> int:
        width = self.graph.type_of(tensor).shape[-1]
        assert isinstance(width, int)
        return width

    def _embedding(self, node: Node) -> None:
        table, dtype = self.add_table(node.inputs["weight"])
        rows, width = self.graph.weights[node.inputs["weight"]].shape
        self._step(
            "embedding",
            out=self._buffer(node.output),
            table=table,
            vocab_size=rows,
            hidden_size=width,
            dtype=dtype,
            vocab_start=node.attrs["vocab_start"],
        )

    def _rms_norm(self, node: Node) -> None:
        self._step(
            "rms_norm",
            x=self._buffer(node.inputs["x"]),
            out=self._buffer(node.output),
            weight=self.add_vector(node.inputs["weight"]),
            width=self._width(node.output),
            eps=node.attrs["eps"],
            num_heads=node.attrs.get("num_heads"),
            rows=self._rows(node.output),
        )

    def _add_rms_norm(self, node: Node) -> None:
        norm, total = node.outputs
        self._into(node.inputs["residual"], total)
        self._step(
            "add_rms_norm",
            x=self._buffer(node.inputs["x"]),
            residual=self._buffer(total),
            out=self._buffer(norm),
            weight=self.add_vector(node.inputs["weight"]),
            width=self._width(norm),
            eps=node.attrs["eps"],
            rows=self._rows(norm),
        )

    def _into(self, tensor: str, destination: str) -> None:
        """Copies `tensor` where the plan could not give `destination` its buffer."""
        if self._buffer(tensor) != self._buffer(destination):
            width = self._width(tensor)
            self._step(
                "copy_rows",
                x=self._buffer(tensor),
                out=self._buffer(destination),
                width=width,
                x_stride=width,
                out_stride=width,
                rows=self._rows(tensor),
            )

    def _add(self, node: Node) -> None:
        y = node.inputs["y"]
        self._step(
            "add",
            x=self._buffer(node.inputs["x"]),
            y=self._operand(y),
            out=self._buffer(node.output),
            width=self._width(node.output),
            broadcast=len(self.graph.type_of(y).shape) == 1,
            rows=self._rows(node.output),
        )

    def _linear(self, node: Node) -> None:
        fmt = self.format_of(node)
        weight, group_size = node.inputs["weight"], None
        out_features, in_features = self._width(node.output), self._width(node.inputs["x"])
        if fmt == "int4":
            group_size = node.attrs.get("group_size") or self.build_config.group_size
        infos = pack.packed_infos(fmt, out_features, in_features, group_size)
        names = {role: weight + ("" if role == "weight" else f".{role}") + f".{fmt}" for role in infos}
        if names["weight"] not in self._packed:
            self._packed.add(names["weight"])
            make = _packer(node, fmt, group_size, in_features)
            self.packings.append(
                Packing(
                    {names[role]: info for role, info in infos.items()},
                    lambda read: {names[role]: tensor for role, tensor in make(read).items()},
                )
            )
        self._step(
            "linear",
            x=self._buffer(node.inputs["x"]),
            out=self._buffer(node.output),
            weight=f"w:{names['weight']}",
            scale=f"w:{names['scale']}" if "scale" in names else None,
            bias=self.add_vector(node.inputs["bias"]) if "bias" in node.inputs else None,
            fmt=fmt,
            in_features=in_features,
            out_features=out_features,
            group_size=group_size,
            rows=self._rows(node.output),
        )

    def _gated_act(self, node: Node) -> None:
        self._step(
            "gated_act",
            x=self._buffer(node.inputs["x"]),
            out=self._buffer(node.output),
            intermediate_size=self._width(node.output),
            activation=node.attrs["activation"],
            rows=self._rows(node.output),
        )

    def _rope_append(self, node: Node) -> None:
        table, spec = self.add_rope_table(node.attrs["rope"])
        norms = {role: self.add_vector(node.inputs[role]) for role in ("q_norm", "k_norm") if role in node.inputs}
        self._step(
            "rope_append",
            qkv=self._buffer(node.inputs["qkv"]),
            q_out=self._buffer(node.output),
            cache=f"kv:{node.attrs['layer']}",
            table=table,
            rotary_dim=spec.dim,
            layout=spec.layout,
            eps=node.attrs.get("eps"),
            **norms,
            **self._heads(node),
        )

    def _paged_attention(self, node: Node) -> None:
        self._step(
            "paged_attention",
            q=self._buffer(node.inputs["q"]),
            out=self._buffer(node.output),
            cache=f"kv:{node.attrs['layer']}",
            scale=node.attrs["scale"],
            window=node.attrs.get("window"),
            **self._heads(node),
        )

    def _heads(self, node: Node) -> dict[str, Any]:
        names = ("num_heads", "num_kv_heads", "head_dim")
        return {
            **{name: node.attrs[name] for name in names},
            "block_size": self.build_config.tokens_per_block,
            "cache_dtype": self.build_config.kv_cache_dtype,
        }

    def _gather_last(self, node: Node) -> None:
        x, out = self._buffer(node.inputs["x"]), self._buffer(node.output)
        self._step("gather_rows", x=x, out=out, width=self._width(node.output))

    def _all_reduce(self, node: Node) -> None:
        self._into(node.inputs["x"], node.output)
        self._collective(node, x=self._buffer(node.output), tensor=node.output)

    def _all_gather(self, node: Node) -> None:
        x = node.inputs["x"]
        self._collective(node, x=self._buffer(x), out=self._buffer(node.output), tensor=x)

    def _send(self, node: Node) -> None:
        self._collective(node, x=self._buffer(node.inputs["x"]), tensor=node.inputs["x"])

    def _recv(self, node: Node) -> None:
        self._collective(node, x=self._buffer(node.output), tensor=node.output)

    def _collective(self, node: Node, *, tensor: str, **buffers: str) -> None:
        """A step between two runs of the kernels."""
        self._step(node.op, **buffers, width=self._width(tensor), rows=self._rows(tensor), **node.attrs)


def _packer(
    node: Node, fmt: str, group_size: int | None, in_features: int
) -> Callable[[ReadWeight], dict[str, torch.Tensor]]:
    """Reads a linear's weights and lays them out."""

    def make(read: ReadWeight) -> dict[str, torch.Tensor]:
        weight = read(node.inputs["weight"])
        if node.attrs.get("quant") == "int8":
            return pack.pack_int8(weight, read(node.inputs["scale"]))
        if node.attrs.get("quant") == "int4":
            assert group_size is not None
            zero = read(node.inputs["zero"]) if "zero" in node.inputs else None
            return pack.pack_int4(weight, read(node.inputs["scale"]), zero, group_size, in_features)
        return pack.pack_linear(weight, fmt, group_size)  # type: ignore[arg-type]

    return make
