"""Lowering to our C++ kernels: each node of the graph becomes one step.

cpu_native_steps.py says what a native plan is.
"""

from __future__ import annotations

from typing import Any

import torch

from trtllm_cli.build.backends.cpu_native_attention import AttentionSteps
from trtllm_cli.build.backends.cpu_native_linears import LinearSteps
from trtllm_cli.build.backends.cpu_native_rows import RowSteps
from trtllm_cli.build.backends.weights import FLOAT_BYTES
from trtllm_cli.build.passes.plan_buffers import plan_buffers
from trtllm_cli.engine import KERNELS
from trtllm_cli.errors import UnsupportedError
from trtllm_cli.functional import NUM_LOGITS, NUM_TOKENS
from trtllm_cli.graph import Node
from trtllm_cli.kernels.cpu import compiler
from trtllm_cli.tensor_file import TensorInfo


class NativeLowering(RowSteps, LinearSteps, AttentionSteps):
    """Each node as one step of the compiled library."""

    def lower(self) -> None:
        """Fills the steps and the packings."""
        self.buffers = plan_buffers(self.graph)
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
