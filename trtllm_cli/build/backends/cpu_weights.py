"""What both ways of the cpu backend share: the format of each weight in the engine, and how it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from trtllm_cli.build.lowered import Packing, ReadWeight
from trtllm_cli.functional import NUM_LOGITS
from trtllm_cli.graph import Graph, Node
from trtllm_cli.kernels.rope import cos_sin_table
from trtllm_cli.kernels.rope_spec import RopeSpec
from trtllm_cli.tensor_file import TensorInfo

if TYPE_CHECKING:
    from trtllm_cli.engine import BuildConfig

FLOAT_BYTES = 4  # activations are float32


@dataclass
class Lowering:
    """What the two ways share: the weights' formats and how each is packed."""

    graph: Graph
    build_config: BuildConfig
    packings: list[Packing] = field(default_factory=list)
    _packed: set[str] = field(default_factory=set)

    def format_of(self, node: Node) -> str:
        """How a linear's weight is stored in the engine. The head of an int4 engine is int8: four bits cost it most."""
        if node.attrs.get("quant"):
            return str(node.attrs["quant"])
        wanted = self.build_config.weight_dtype
        is_head = self.graph.type_of(node.output).shape[0] == NUM_LOGITS
        return "int8" if wanted == "int4" and is_head else wanted

    def add(self, name: str, info: TensorInfo, make: Callable[[ReadWeight], torch.Tensor]) -> str:
        """An engine tensor made from one weight (or none); its reference for the plan."""
        if name not in self._packed:
            self._packed.add(name)
            self.packings.append(Packing({name: info}, lambda read: {name: make(read)}))
        return f"w:{name}"

    def add_vector(self, weight: str) -> str:
        """A norm's weight or a bias, float32."""
        (width,) = self.graph.weights[weight].shape
        return self.add(weight, TensorInfo("float32", (width,)), lambda read: read(weight).float())

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
