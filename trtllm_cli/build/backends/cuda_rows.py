"""Ops that compute each row by itself, on the GPU: embedding, norms, activations, sums, quantization, copies."""

from __future__ import annotations

from typing import Any

import triton

from trtllm_cli.build.backends.cuda_program import CudaLowering, Dim, Launch
from trtllm_cli.functional import NUM_TOKENS
from trtllm_cli.graph import Node
from trtllm_cli.models.stored import FP8_BLOCK

BLOCK = 1024  # columns of a program that computes elements one by one
_FEW = 132  # rows up to which each has a multiprocessor to itself


class RowLaunches(CudaLowering):
    """Launches of kernels/triton/norm.py and rows.py."""

    def _embedding(self, node: Node) -> None:
        weight = node.inputs["weight"]
        ref, kind = self.plain(weight)
        rows, _ = self.graph.weights[weight].shape

        def launches(when: str) -> list[Launch]:
            args = {
                "ids_ptr": ("*i32", self.ref(node.inputs["ids"])), "last_tokens_ptr": ("*i32", "last"),
                "weight_ptr": (kind, ref), "out_ptr": self._out(node.output),
                "vocab_start": ("i32", node.attrs.get("vocab_start", 0)), "num_rows": ("i32", rows),
            }  # fmt: skip
            return [self.by_columns("embedding", node.output, args, when=when)]

        self.ways(node.op, NUM_TOKENS, self.residual_ways(node, launches))

    def _rms_norm(self, node: Node) -> None:
        self._norm(node, "rms_norm")

    def _layer_norm(self, node: Node) -> None:
        self._norm(node, "layer_norm")

    def _add_rms_norm(self, node: Node) -> None:
        self._norm(node, "rms_norm")

    def _add_layer_norm(self, node: Node) -> None:
        self._norm(node, "layer_norm")

    def _norm(self, node: Node, function: str) -> None:
        few = self.norm_launches(node, function, few=True)
        many = self.residual_ways(node, lambda when: self.norm_launches(node, function, few=False, when=when))
        self.ways(node.op, self.rows(node.outputs[0]), [(_FEW, few), *many])

    def norm_launches(self, node: Node, function: str, *, few: bool, when: str = "") -> list[Launch]:
        """A norm, for few rows or for many."""
        x, residual, out = node.inputs["x"], node.inputs.get("residual"), node.outputs[0]
        total, heads = self.width(x), node.attrs.get("num_heads") or 1
        args: dict[str, tuple[str, Any]] = {
            "x_ptr": self._out(x), "residual_ptr": self._out(residual) if residual else ("*fp32", None),
            "weight_ptr": self.vector(node.inputs["weight"]), "out_ptr": self._out(out),
            "new_residual_ptr": self._out(node.outputs[1]) if residual else ("*fp32", None),
            **self._steps_of(node), "eps": ("fp32", node.attrs["eps"]),
        }  # fmt: skip
        constants: dict[str, Any] = {
            "NUM_HEADS": heads, "WIDTH": total // heads, "BLOCK_HEADS": triton.next_power_of_2(heads),
            "BLOCK": triton.next_power_of_2(total // heads), "X_STRIDE": total, "OUT_STRIDE": total,
            "HAS_RESIDUAL": residual is not None, "QUANT": self.quant_of(node),
        }  # fmt: skip
        if function == "layer_norm":
            bias = node.inputs.get("bias")
            args["bias_ptr"] = self.vector(bias) if bias else ("*bf16", None)
            constants["HAS_BIAS"] = bias is not None
        wide = constants["QUANT"] != "none" or total > 4096
        warps = 4 if total < 2048 else 16 if few else 8 if wide else 4
        return [self.launch("norm", function, [self._dim(out)], args, num_warps=warps, when=when, **constants)]

    def _gated_act(self, node: Node) -> None:
        self.step(node.op, [self.gated_launch(node)])

    def gated_launch(self, node: Node, up: Any = None) -> Launch:
        """The activation by itself. `up`: where up's rows are, where they do not follow the gate's in each row."""
        out, width = node.outputs[0], self.width(node.outputs[0])
        if "x" in node.inputs:
            x = node.inputs["x"]
            kind = self.type_of(x)
            gate, other, stride, offset = self.ref(x), up or self.ref(x), 2 * width, width
            if up:
                stride, offset = width, 0
        else:
            kind = self.type_of(node.inputs["gate"])
            gate, other, stride, offset = self.ref(node.inputs["gate"]), self.ref(node.inputs["up"]), width, 0
        return self.gated_rows(
            node, self._dim(out), width, (kind, gate), (kind, other), GATE_STRIDE=stride, UP_STRIDE=stride,
            GATE_OFFSET=0, UP_OFFSET=offset,
        )  # fmt: skip

    def gated_rows(
        self, node: Node, rows: Dim, width: int, gate: tuple[str, Any], up: tuple[str, Any], **layout: Any
    ) -> Launch:
        """The activation of `rows`, each `width` outputs; of `gate` and `up` Triton's type and reference."""
        quant = self.quant_of(node)
        block = triton.next_power_of_2(width) if quant == "token" else min(BLOCK, triton.next_power_of_2(width))
        args = {"gate_ptr": gate, "up_ptr": up, "out_ptr": self._out(node.outputs[0]), **self._steps_of(node)}
        grid: list[Dim] = [rows, 1 if quant == "token" else -(-width // block)]
        return self.launch(
            "rows", "gated_act", grid, args, num_warps=16 if block > 8192 else 8 if block > BLOCK else 4, WIDTH=width,
            BLOCK=block, ACTIVATION=node.attrs["activation"], QUANT=quant, **layout,
        )  # fmt: skip

    def _act(self, node: Node) -> None:
        self._unary(node, node.attrs["activation"], 0.0)

    def _scale(self, node: Node) -> None:
        self._unary(node, "scale", node.attrs["factor"])

    def _cast(self, node: Node) -> None:
        self._unary(node, "scale", 1.0)

    def _softcap(self, node: Node) -> None:
        self._unary(node, "softcap", node.attrs["cap"])

    def _unary(self, node: Node, op: str, number: float) -> None:
        x, width = node.inputs["x"], self.width(node.output)
        args = {"x_ptr": self._out(x), "out_ptr": self._out(node.output), "number": ("fp32", float(number))}
        self.step(node.op, [self.by_columns("unary", node.output, args, X_STRIDE=width, OP=op)])

    def _add(self, node: Node) -> None:
        self._binary(node)

    def _mul(self, node: Node) -> None:
        self._binary(node)

    def _binary(self, node: Node) -> None:
        x, y, width = node.inputs["x"], node.inputs["y"], self.width(node.output)
        is_row = y in self.graph.weights
        args = {
            "x_ptr": self._out(x), "y_ptr": self.vector(y) if is_row else self._out(y),
            "out_ptr": self._out(node.output),
        }  # fmt: skip
        strides = {"X_STRIDE": width, "Y_STRIDE": 0 if is_row else width}
        self.step(node.op, [self.by_columns("binary", node.output, args, OP=node.op, **strides)])

    def _quantize(self, node: Node) -> None:
        q, how, width = node.outputs[0], self.quant_of(node), self.width(node.outputs[0])
        parts = 1 if how == "group" else width // (node.attrs.get("out_group") or width)  # each as a row of its own
        width //= parts
        args = {"x_ptr": self._out(node.inputs["x"]), "out_ptr": self._out(q), **self._steps_of(node)}
        block = min(8192 if how == "token" else BLOCK, triton.next_power_of_2(width))
        grid: list[Dim] = [[f"{self.rows(q)}*{parts}", 1], 1 if how == "token" else -(-width // block)]
        launch = self.launch("rows", "quantize", grid, args, WIDTH=width, X_STRIDE=width, BLOCK=block, QUANT=how)
        self.step(node.op, [launch])

    def _qdq(self, node: Node) -> None:
        width, fmt = self.width(node.output), node.attrs["fmt"]
        scale = node.inputs.get("scale")
        group = node.attrs.get("group_size") or width
        block = triton.next_power_of_2(group)
        in_row = -(-width // group)
        groups = max(1, min(BLOCK // block, triton.next_power_of_2(width // group)))
        args = {
            "x_ptr": self._out(node.inputs["x"]), "scale_ptr": ("*fp32", self.largest(scale) if scale else None),
            "out_ptr": self._out(node.output),
        }  # fmt: skip
        grid: list[Dim] = [self._dim(node.output), -(-in_row // groups)]
        launch = self.launch(
            "rows", "qdq", grid, args, WIDTH=width, X_STRIDE=width, GROUP=group, BLOCK_GROUPS=groups, BLOCK=block,
            FMT=fmt, HAS_SCALE=scale is not None,
        )  # fmt: skip
        self.step(node.op, [launch])

    def _gather_columns(self, node: Node) -> None:
        args = {
            "x_ptr": self._out(node.inputs["x"]), "indices_ptr": self.plain(node.inputs["indices"])[::-1],
            "out_ptr": self._out(node.output),
        }  # fmt: skip
        stride = self.width(node.inputs["x"])
        self.step(node.op, [self.by_columns("gather_columns", node.output, args, X_STRIDE=stride)])

    def _gather_last(self, node: Node) -> None:
        """In place by way of other memory; steps of one token a sequence have all rows where they belong."""
        x, y, width = node.inputs["x"], node.output, self.width(node.output)

        def launches(when: str) -> list[Launch]:
            out = self._out(y)
            args = {"x_ptr": self._out(x), "indices_ptr": ("*i32", self.ref(node.inputs["indices"])), "out_ptr": out}
            if self.ref(x) != self.ref(y):
                return [self.by_columns("gather_rows", y, args, X_STRIDE=width, when=when)]
            if when == "decode":
                return []
            nbytes = self.build_config.max_batch_size * width * self.bytes_of(y)
            args["out_ptr"] = between = (out[0], self.room("gathered rows", nbytes))
            back = {"x_ptr": between, "out_ptr": out, "number": ("fp32", 1.0)}
            return [
                self.by_columns("gather_rows", y, args, X_STRIDE=width, when="mixed"),
                self.by_columns("unary", y, back, X_STRIDE=width, OP="scale", when="mixed"),
            ]

        self.ways(node.op, NUM_TOKENS, self.residual_ways(node, launches))

    def _split(self, node: Node) -> None:
        """Each part copied: who reads them wants whole rows."""
        x, stride = node.inputs["x"], self.width(node.inputs["x"])
        kind, ref = self._out(x)
        launches, start = [], 0
        for name in node.outputs:
            at = [ref, None, start * (4 if kind == "*fp32" else 2)]
            args = {"x_ptr": (kind, at), "out_ptr": self._out(name), "number": ("fp32", 1.0)}
            launches.append(self.by_columns("unary", name, args, X_STRIDE=stride, OP="scale"))
            start += self.width(name)
        self.step(node.op, launches)

    def _concat(self, node: Node) -> None:
        x, y, heads = node.inputs["x"], node.inputs["y"], node.attrs["num_heads"]
        width = self.width(node.output)
        block = min(BLOCK, triton.next_power_of_2(width))
        args = {"x_ptr": self._out(x), "y_ptr": self._out(y), "out_ptr": self._out(node.output)}
        launch = self.launch(
            "rows", "concat", [self._dim(node.output), -(-width // block)], args, X_WIDTH=self.width(x) // heads,
            Y_WIDTH=self.width(y) // heads, X_STRIDE=self.width(x), Y_STRIDE=self.width(y), NUM_HEADS=heads,
            BLOCK=block,
        )  # fmt: skip
        self.step(node.op, [launch])

    def _rope(self, node: Node) -> None:
        x, heads = node.inputs["x"], node.attrs["num_heads"]
        table, spec = self.add_rope_table(node.attrs["rope"])
        head_dim = self.width(x) // heads
        rest = head_dim - spec.dim
        block_heads = min(8, triton.next_power_of_2(heads))
        args = {
            "x_ptr": self._out(x), "positions_ptr": ("*i32", self.ref(node.inputs["positions"])),
            "table_ptr": ("*fp32", table), "out_ptr": self._out(node.output),
        }  # fmt: skip
        launch = self.launch(
            "rows", "rope", [self._dim(x), -(-heads // block_heads)], args, NUM_HEADS=heads, HEAD_DIM=head_dim,
            ROTARY_DIM=spec.dim, X_STRIDE=self.width(x), BLOCK_HEADS=block_heads,
            BLOCK_HALF=triton.next_power_of_2(spec.dim // 2), BLOCK_REST=triton.next_power_of_2(rest) if rest else 0,
            LAYOUT=spec.layout,
        )  # fmt: skip
        self.step(node.op, [launch])

    def by_columns(self, function: str, out: str, args: dict[str, tuple[str, Any]], **constants: Any) -> Launch:
        """A kernel of rows.py whose grid is (rows of `out`, blocks of its columns)."""
        width = self.width(out)
        block = min(BLOCK, triton.next_power_of_2(width))
        grid: list[Dim] = [self._dim(out), -(-width // block)]
        return self.launch("rows", function, grid, args, WIDTH=width, BLOCK=block, **constants)

    def quant_of(self, node: Node) -> str:
        """How a kernel quantizes its output (kernels/triton/device.py); an expert's is a row of its own."""
        if node.attrs.get("out_group") == FP8_BLOCK and node.op != "expert_gated_act":
            return "group"
        return str(node.attrs.get("out_quant", "none"))

    def _steps_of(self, node: Node) -> dict[str, tuple[str, Any]]:
        """The operands of a quantized output."""
        scale = self.largest(node.inputs["out_scale"]) if "out_scale" in node.inputs else None
        steps = self.ref(node.outputs[-1]) if node.attrs.get("out_quant") == "token" else None
        return {"out_scale_ptr": ("*fp32", scale), "row_scale_ptr": ("*fp32", steps)}

    def _out(self, name: str) -> tuple[str, str]:
        """An activation's type and reference."""
        return self.type_of(name), self.ref(name)

    def _dim(self, name: str) -> Dim:
        """A program for each row."""
        return [self.rows(name), 1]
