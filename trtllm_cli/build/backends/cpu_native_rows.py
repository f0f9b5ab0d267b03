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
            ids=node.inputs["ids"],
        )

    def _rms_norm(self, node: Node) -> None:
        self._norm("rms_norm", node, node.output, num_heads=node.attrs.get("num_heads"))

    def _layer_norm(self, node: Node) -> None:
        self._norm("layer_norm", node, node.output, num_heads=node.attrs.get("num_heads"))

    def _add_rms_norm(self, node: Node) -> None:
        self._add_norm("add_rms_norm", node)

    def _add_layer_norm(self, node: Node) -> None:
        self._add_norm("add_layer_norm", node)

    def _add_norm(self, op: str, node: Node) -> None:
        norm, total = node.outputs
        self._into(node.inputs["residual"], total)
        self._norm(op, node, norm, residual=self._buffer(total))

    def _norm(self, op: str, node: Node, out: str, **more: str | int | None) -> None:
        self._step(
            op,
            x=self._buffer(node.inputs["x"]),
            out=self._buffer(out),
            weight=self.add_vector(node.inputs["weight"]),
            bias=self.add_vector(node.inputs["bias"]) if "bias" in node.inputs else None,
            width=self._width(out),
            eps=node.attrs["eps"],
            rows=self._rows(out),
            **more,
        )

    def _add(self, node: Node) -> None:
        self._both(node)

    def _mul(self, node: Node) -> None:
        self._both(node)

    def _both(self, node: Node) -> None:
        y = node.inputs["y"]
        self._map(node, y=self._operand(y), broadcast=len(self.graph.type_of(y).shape) == 1)

    def _act(self, node: Node) -> None:
        self._map(node, activation=node.attrs["activation"])

    def _scale(self, node: Node) -> None:
        self._map(node, factor=node.attrs["factor"])

    def _softcap(self, node: Node) -> None:
        self._map(node, cap=node.attrs["cap"])

    def _map(self, node: Node, **more: str | float) -> None:
        x, out = self._buffer(node.inputs["x"]), self._buffer(node.output)
        self._step(node.op, x=x, out=out, width=self._width(node.output), rows=self._rows(node.output), **more)

    def _gated_act(self, node: Node) -> None:
        joint = "x" in node.inputs
        self._step(
            "gated_act",
            x=self._buffer(node.inputs["x" if joint else "gate"]),
            up=None if joint else self._buffer(node.inputs["up"]),
            out=self._buffer(node.output),
            intermediate_size=self._width(node.output),
            activation=node.attrs["activation"],
            rows=self._rows(node.output),
        )

    def _split(self, node: Node) -> None:
        x, first = node.inputs["x"], 0
        for out in node.outputs:
            width = self._width(out)
            self._step(
                "copy_rows",
                x=self._buffer(x),
                out=self._buffer(out),
                width=width,
                x_first=first,
                x_stride=self._width(x),
                out_stride=width,
                rows=self._rows(out),
            )
            first += width

    def _concat(self, node: Node) -> None:
        x, y = node.inputs["x"], node.inputs["y"]
        self._step(
            "concat",
            x=self._buffer(x),
            y=self._buffer(y),
            out=self._buffer(node.output),
            x_width=self._width(x),
            y_width=self._width(y),
            num_heads=node.attrs["num_heads"],
            rows=self._rows(node.output),
        )

    def _gather_last(self, node: Node) -> None:
        x, out = self._buffer(node.inputs["x"]), self._buffer(node.output)
        self._step("gather_rows", x=x, out=out, width=self._width(node.output))
