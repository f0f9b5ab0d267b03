"""What the backends share: the format of each weight in the engine, and how it is made."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from trtllm_cli.build.lowered import Packing, ReadWeight
from trtllm_cli.graph import Graph, Node
from trtllm_cli.kernels.linear_format import INT8_GROUP_SIZE, ROLES, LinearFormat
from trtllm_cli.kernels.rope import cos_sin_table
from trtllm_cli.kernels.rope_spec import RopeSpec
from trtllm_cli.tensor_file import TensorInfo

if TYPE_CHECKING:
    from trtllm_cli.engine import BuildConfig

FLOAT_BYTES = 4  # activations are float32


@dataclass(frozen=True)
class Stack:
    """A weight, or those of experts or heads, as the checkpoint has it: tensors by role, [out, in] or [n, out, in]."""

    parts: Mapping[str, torch.Tensor]
    fmt: LinearFormat
    quantized: bool

    def one(self, index: int | None = None) -> dict[str, torch.Tensor]:
        """Member `index`, or the only one, in its format."""
        parts = {role: t if index is None else t[index] for role, t in self.parts.items()}
        return parts if self.quantized else self.fmt.quantize(parts["weight"])


@dataclass
class Lowering:
    """Keeps the weights' formats and how each is packed."""

    graph: Graph
    build_config: BuildConfig
    packings: list[Packing] = field(default_factory=list)
    _packed: set[str] = field(default_factory=set)

    def format_of(self, node: Node) -> LinearFormat:
        """How the weight of a linear, expert_linear or head_linear is stored in the engine.

        What the checkpoint has quantized stays as it is. Not all of the rest is worth quantizing: four bits cost the
        head most, which gets eight, and a router is small and decides much.
        """
        a, wanted = node.attrs, self.build_config.weight_dtype
        if quant := a.get("quant"):
            return LinearFormat(quant, a.get("group_size"), "zero" in node.inputs)
        if wanted in ("float32", "bfloat16"):
            return LinearFormat(wanted)
        if node.op == "head_linear" or node.output in self._routed:
            return LinearFormat("bfloat16")
        is_head = node.output in self.logits
        name, size = (
            ("int8", INT8_GROUP_SIZE) if is_head and wanted == "int4" else (wanted, self.build_config.group_size)
        )
        return LinearFormat(name, size and min(size, self._in_features(node)), has_zero=name == "int4")

    @functools.cached_property
    def logits(self) -> set[str]:
        """The graph's outputs, and what they are made of by ops that only gather, scale or cap."""
        found = set(self.graph.outputs)
        for node in reversed(self.graph.nodes):
            if node.op in ("all_gather", "scale", "softcap") and node.output in found:
                found.add(node.inputs["x"])
        return found

    @functools.cached_property
    def _routed(self) -> set[str]:
        """The logits by which tokens find their experts."""
        return {node.inputs["logits"] for node in self.graph.nodes if node.op == "route"}

    def read_format(self, node: Node, read: ReadWeight) -> Stack:
        """A linear's weight: one, or those of each expert or head."""
        parts = {role: read(node.inputs[role]) for role in ROLES if role in node.inputs}
        if node.op == "head_linear":
            heads = parts["weight"].unflatten(0, (node.attrs["num_heads"], -1))
            parts["weight"] = heads.transpose(1, 2) if node.attrs.get("transposed") else heads
        return Stack(parts, self.format_of(node), quantized="quant" in node.attrs)

    def _in_features(self, node: Node) -> int:
        """Inputs of the weight of a linear or expert_linear."""
        columns = int(self.graph.weights[node.inputs["weight"]].shape[-1])
        return 2 * columns if node.attrs.get("quant") in ("int4", "fp4") else columns

    def add(self, name: str, info: TensorInfo, make: Callable[[ReadWeight], torch.Tensor]) -> str:
        """An engine tensor made from one weight (or none); its reference for the plan."""
        if name not in self._packed:
            self._packed.add(name)
            self.packings.append(Packing({name: info}, lambda read: {name: make(read)}))
        return f"w:{name}"

    def add_vector(self, weight: str) -> str:
        """A norm's weight or a bias, float32."""
        assert len(self.graph.weights[weight].shape) == 1
        return self.add_tensor(weight)

    def add_tensor(self, weight: str) -> str:
        """A weight that stays as it is, numbers as float32 and indices as int32."""
        w = self.graph.weights[weight]
        dtype = "int32" if w.dtype == "int32" else "float32"
        return self.add(weight, TensorInfo(dtype, w.shape), lambda read: read(weight).to(getattr(torch, dtype)))

    def add_table(self, weight: str) -> tuple[str, str]:
        """A row-major embedding table, and its dtype: float32 in a float32 engine, else bfloat16."""
        dtype = "float32" if self.build_config.weight_dtype == "float32" else "bfloat16"
        shape = self.graph.weights[weight].shape
        name = f"{weight}.rows"
        return self.add(name, TensorInfo(dtype, shape), lambda read: read(weight).to(getattr(torch, dtype))), dtype

    def add_rope_table(self, rope: dict[str, Any]) -> tuple[str, RopeSpec]:
        """The cosines and sines of every position that the engine allows."""
        spec = RopeSpec.model_validate(rope)
        length = self.build_config.max_seq_len
        name = f"rope.{spec.model_dump_json(exclude_none=True)}"
        return self.add(name, TensorInfo("float32", (length, spec.dim)), lambda _: cos_sin_table(spec, length)), spec
