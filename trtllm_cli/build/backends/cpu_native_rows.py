"""Lowering of the ops that take each row by itself, but for linears."""

from __future__ import annotations

from trtllm_cli.build.backends.cpu_native_steps import NativeSteps
from trtllm_cli.graph import Node


class RowSteps(NativeSteps):
    """Embedding, norms, activations, sums and copies."""

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

    def _gated_act(self, node: Node) -> None:
        self._step(
            "gated_act",
            x=self._buffer(node.inputs["x"]),
            out=self._buffer(node.output),
            intermediate_size=self._width(node.output),
            activation=node.attrs["activation"],
            rows=self._rows(node.output),
        )

    def _gather_last(self, node: Node) -> None:
        x, out = self._buffer(node.inputs["x"]), self._buffer(node.output)
        self._step("gather_rows", x=x, out=out, width=self._width(node.output))
