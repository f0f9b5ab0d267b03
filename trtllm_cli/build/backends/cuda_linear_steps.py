"""Linears on the GPU: our kernels for few tokens, cuBLASLt through torch for many; gate, up and activation as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch

from trtllm_cli.build.backends.cuda_linears import (
    LinearLaunch,
    LinearShape,
    PerWhat,
    argument,
    dequantized,
    fitted,
    for_many,
    is_grouped,
    launch_of,
    pack_weight,
    packed_tensors,
    weight_only,
)
from trtllm_cli.build.backends.cuda_program import TYPES, Launch
from trtllm_cli.build.backends.cuda_rows import RowLaunches
from trtllm_cli.build.backends.cuda_tactics import LinearTactics
from trtllm_cli.build.lowered import Packing, ReadWeight
from trtllm_cli.graph import Node
from trtllm_cli.kernels.linear_format import ROLES, LinearFormat
from trtllm_cli.models.stored import FP8_BLOCK
from trtllm_cli.tensor_file import TensorInfo

_FLOAT8 = "float8_e4m3fn"
_APART = 16  # floats from one scale to the next: cuBLASLt wants them at multiples of 16 bytes


@dataclass
class LinearLaunches(RowLaunches):
    """Launches of kernels/triton/linear.py, and torch's matrix products."""

    tactics: LinearTactics = field(default_factory=LinearTactics)

    def linear_shapes(self) -> list[LinearShape]:
        """Of every linear, as its kernel for few tokens computes it."""
        linears = [node for node in self.graph.nodes if node.op == "linear"]
        return [self._few_shape(node, self._fused(self._activation_after(node))) for node in linears]

    def computed_elsewhere(self, node: Node) -> int:  # noqa: ARG002
        """Tokens up to which a node's own step has nothing to do."""
        return 0

    def _linear(self, node: Node) -> None:
        if self._activation_after(node) is None:
            self._steps_of_linear(node, None)

    def _gated_act(self, node: Node) -> None:
        linear = self.producers.get(node.inputs.get("x", ""))
        if linear is not None and self._activation_after(linear) is node:
            self._steps_of_linear(linear, node)
        else:
            super()._gated_act(node)

    def _activation_after(self, node: Node) -> Node | None:
        """The gated activation that is computed together with this linear: its only reader."""
        readers = self.consumers.get(node.output, [])
        if node.op == "linear" and len(readers) == 1 and readers[0].op == "gated_act" and "x" in readers[0].inputs:
            return readers[0]
        return None

    def _steps_of_linear(self, node: Node, act: Node | None) -> None:
        shape = self._shape(node)
        weights = self._pack(node, shape)
        rows = self.rows(node.output)
        fused = self._fused(act)
        few_shape = self._few_shape(node, fused)

        def launches(few: LinearLaunch) -> list[Launch]:
            after = [self.gated_launch(act)] if act is not None and fused is None else []
            return [self._few(node, few, weights, fused, rows), *after]

        if is_grouped(shape):
            many = launches(launch_of(few_shape, fitted(few_shape, for_many(few_shape), self.arch)))
        else:
            many = self._many(node, act, shape, weights)
        ways: list[tuple[int | None, list[Launch]]] = []
        others: list[list[list[Launch]]] = []
        for most, few in self.tactics.few_tokens(few_shape):
            if most <= self.computed_elsewhere(act or node):
                continue
            ways.append((most, launches(few)))
            more = self.tactics.others(few_shape, most)
            others.append([] if more is None else [*map(launches, more), many])
        ways.append((None, many))
        self.ways(node.op if act is None else f"{node.op}+{act.op}", rows, ways, others=others)

    def _fused(self, act: Node | None) -> Node | None:
        """The activation, if the linear's kernel for few tokens computes it: not where each row gets a scale."""
        return None if act is None or act.attrs.get("out_quant") == "token" else act

    def _few_shape(self, node: Node, fused: Node | None) -> LinearShape:
        """The linear's shape, with the activation and the output of the node that ends it."""
        out = (fused or node).outputs[0]
        return replace(
            self._shape(node), gated=fused.attrs["activation"] if fused else "", out_type=TYPES[self.dtype(out)]
        )

    def _few(
        self, node: Node, few: LinearLaunch, weights: Mapping[str, str], fused: Node | None, rows: str,
        of_norms: Mapping[str, Any] = MappingProxyType({}),
    ) -> Launch:  # fmt: skip
        """A launch for few tokens; `of_norms`: operands by role that differ where it computes norms."""
        values = {
            "x": self.ref(node.inputs["x"]), "w": weights["weight"], "w_scale": weights.get("scale"),
            "w_zero": weights.get("zero"), "x_scale": self.steps_of_input(node),
            "bias": self.plain(node.inputs["bias"])[0] if "bias" in node.inputs else None,
            "out_scale": self.largest(fused.inputs["out_scale"]) if fused and "out_scale" in fused.inputs else None,
            "y": self.ref((fused or node).outputs[0]), "num_tokens": f"n:{rows}",
            "scratch": self.room("linear", few.scratch) if few.scratch else None, "eps": 0.0,
            **dict.fromkeys(("residual", "new_residual", "norm_weight", "squares", "staging", "deltas", "step")),
            "calls": 0, "call": 0, **of_norms,
        }  # fmt: skip
        grid = [dim if isinstance(dim, int) else [rows, dim[1]] for dim in few.grid]
        args = {argument(role): values[role] for role in few.operands}
        return self.launch_source(few.source, grid, args)

    def _many(self, node: Node, act: Node | None, shape: LinearShape, weights: Mapping[str, str]) -> list[Launch]:
        """torch's product, of int8 and int4 weights after writing them as bfloat16."""
        is_fp8, before, w = shape.form == "fp8", [], weights["weight"]
        if weight_only(shape):
            plain = dequantized(shape)
            w = self.room("plain weight", shape.n * shape.k * 2)
            values = {"w": weights["weight"], "w_scale": weights["scale"], "w_zero": weights.get("zero"), "out": w}
            args = {argument(role): values[role] for role in plain.operands}
            before.append(self.launch_source(plain.source, list(plain.grid), args))
        call: Launch = {
            "call": "scaled_mm" if is_fp8 else "mm", "x": self.ref(node.inputs["x"]),
            "x_dtype": _FLOAT8 if is_fp8 else "bfloat16", "w": w, "y": self.ref(node.output),
            "y_dtype": self.dtype(node.output), "rows": self.rows(node.output), "n": shape.n, "k": shape.k,
            "bias": self.plain(node.inputs["bias"])[0] if "bias" in node.inputs else None,
        }  # fmt: skip
        after = [] if act is None else [self.gated_launch(act)]
        if call["bias"] is not None and call["y_dtype"] == "float32":  # which torch adds to bfloat16 only
            call["bias"], after = None, [self._biased(node), *after]
        if not is_fp8:
            return [*before, call, *after]
        call["x_scale"], call["x_scale_rows"] = self.steps_of_input(node), shape.x_scale == "row"
        if "halves" not in weights:
            call["w_scale"], call["w_scale_rows"] = weights["scale"], shape.w_scale == "row"
            return [call, *after]
        # Gate and up have a scale each: two products, up's rows behind the gate's.
        assert act is not None, "stacked halves are gate and up"
        half, itemsize = shape.n // 2, 2
        up = [call["y"], call["rows"], half * itemsize]
        common = {**call, "n": half, "w_scale_rows": False}
        up_weight = {"w": [call["w"], None, half * shape.k], "w_scale": [weights["halves"], None, 4 * _APART]}
        return [
            {**common, "w_scale": [weights["halves"], None, 0]},
            {**common, **up_weight, "y": up},
            self.gated_launch(act, up),
        ]

    def _biased(self, node: Node) -> Launch:
        """The addition of a linear's bias by itself."""
        y, bias = self._out(node.output), self.plain(node.inputs["bias"])[::-1]
        width = self.width(node.output)
        args = {"x_ptr": y, "y_ptr": bias, "out_ptr": y}
        return self.by_columns("binary", node.output, args, X_STRIDE=width, Y_STRIDE=0, OP="add")

    def _shape(self, node: Node) -> LinearShape:
        """What the kernel is specialized for."""
        fmt = self._kernel_format(node)
        n, k = self.width(node.output), self.width(node.inputs["x"])
        x_scale = node.inputs.get("x_scale")
        scales = self.graph.weights[node.inputs["scale"]].shape[-1] if "scale" in node.inputs else 0
        w_scale: PerWhat = "none"
        per_input: PerWhat = "none"
        if fmt.name == "fp8":
            w_scale, per_input = "one" if scales == 1 else "row", "one" if x_scale in self.graph.weights else "row"
            if fmt.group_size:
                w_scale = per_input = "group"
        group = (fmt.group_size or k) if fmt.name in ("int8", "int4") else fmt.group_size or 0
        return LinearShape(
            form={"bfloat16": "bf16", "fp8": "fp8", "int8": "int8", "int4": "int4"}[fmt.name],  # type: ignore[arg-type]
            n=n, k=k, group=group, has_zero=fmt.has_zero, w_scale=w_scale, x_scale=per_input,
            has_bias="bias" in node.inputs, x_type=self.type_of(node.inputs["x"]),
        )  # fmt: skip

    def _kernel_format(self, node: Node) -> LinearFormat:
        """How the kernels read the weight; what they have no way for becomes bfloat16 in the engine."""
        fmt = self.format_of(node)
        n, k = self.width(node.output), self.width(node.inputs["x"])
        match fmt.name:
            case "fp8" if fmt.group_size is None and "x_scale" in node.inputs and n % 16 == k % 16 == 0:
                return fmt  # cuBLASLt wants multiples of 16
            case "fp8" if fmt.group_size == FP8_BLOCK and "x_scale" in node.inputs and k % FP8_BLOCK == 0:
                return fmt
            case "int8" if k % (fmt.group_size or k) == 0 and (fmt.group_size or 32) % 32 == 0 and not fmt.has_zero:
                return fmt
            case "int4" if fmt.group_size in (32, 64, 128) and k % fmt.group_size == 0:
                return fmt
        return LinearFormat("bfloat16")

    def in_bfloat16(self) -> dict[str, int]:
        """What quantized linears are stored in that no kernel reads, so that they become bfloat16; how many do."""
        found: Counter[str] = Counter()
        for node in self.graph.nodes:
            if node.op != "linear" or self._kernel_format(node).name != "bfloat16":
                continue
            fmt, k = self.format_of(node), self.width(node.inputs["x"])
            if fmt.name not in ("bfloat16", "float32"):
                groups = f" in groups of {fmt.group_size}" if fmt.group_size else ""
                better = ": convert again with --group-size 64" if groups and fmt.name.startswith("int") else ""
                if fmt.group_size and k % fmt.group_size:
                    groups, better = f"{groups} of {k} inputs", ""
                found[f"{fmt.name}{groups}{better}"] += 1
        return dict(sorted(found.items()))

    def _pack(self, node: Node, shape: LinearShape) -> dict[str, str]:
        """The packed weight's references by role."""
        fmt = self._kernel_format(node)
        weight = node.inputs["weight"]
        if fmt.name == "bfloat16" and "quant" not in node.attrs:
            return {"weight": self.plain(weight)[0]}
        stored = self.format_of(node)
        halves = (
            fmt.name == "fp8"
            and not fmt.group_size
            and self.graph.weights[node.inputs["scale"]].shape[-1] not in (1, shape.n)
        )

        def make(read: ReadWeight) -> dict[str, torch.Tensor]:
            stack = self.read_format(node, read)
            parts = stack.one()
            if fmt.name == "bfloat16":
                return {"weight": stored.dequantize(parts, shape.k).bfloat16()}
            made: dict[str, torch.Tensor] = {role: parts[role] for role in ROLES[:3] if role in parts}
            for role in ("scale", "zero"):
                if role in made:
                    made[role] = made[role].float()
            if halves:
                made["halves"] = made["scale"].new_zeros(2, _APART)
                made["halves"][:, 0] = made["scale"]
            if halves or (fmt.name == "int8" and made["scale"].numel() < shape.n):  # one for all outputs, or for a half
                made["scale"] = made["scale"].repeat_interleave(shape.n // made["scale"].numel())
            return pack_weight(shape, made)

        packed = packed_tensors(shape)
        if halves:
            packed["halves"] = torch.empty(2, _APART, device="meta")
        infos = {role: TensorInfo(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for role, t in packed.items()}
        names = {role: f"{weight}.{role}.{fmt.name}" for role in infos}
        if names["weight"] not in self._packed:
            self._packed.add(names["weight"])
            self.packings.append(
                Packing(
                    {names[role]: info for role, info in infos.items()},
                    lambda read: {names[role]: t for role, t in make(read).items()},
                )
            )
        return {role: f"w:{name}" for role, name in names.items()}
