"""How a linear layer's weight is stored, as a checkpoint has it or as a build quantizes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

FormatName = Literal["float32", "bfloat16", "int8", "int4", "fp8", "fp4"]
DEFAULT_GROUP_SIZE = 32  # of int4 weights
INT8_GROUP_SIZE = 64
ROLES = ("weight", "scale", "zero", "global_scale")  # the tensors that a weight may be made of


@dataclass(frozen=True)
class LinearFormat:
    """A number format, and how many inputs share a scale (None: all of an output's); see functional.linear."""

    name: FormatName
    group_size: int | None = None
    has_zero: bool = False  # groups have a zero

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """A plain weight [out, in] in this format: by role, "weight" and what belongs to it."""
        from trtllm_cli.kernels import quantization

        match self.name:
            case "int8":
                return dict(zip(("weight", "scale"), quantization.quantize_int8(weight, self.group_size), strict=True))
            case "int4":
                assert self.group_size is not None
                parts = quantization.quantize_int4(weight, self.group_size)
                return dict(zip(("weight", "scale", "zero"), parts, strict=True))
            case "fp8":
                return dict(zip(("weight", "scale"), quantization.quantize_fp8(weight, self.group_size), strict=True))
            case "float32":
                return {"weight": weight.float()}
            case "bfloat16":
                return {"weight": weight.bfloat16()}
        raise AssertionError(self.name)

    def dequantize(self, parts: Mapping[str, torch.Tensor], in_features: int) -> torch.Tensor:
        """float32 [..., out, in] of what `quantize` or a checkpoint gives."""
        if self.name in ("float32", "bfloat16"):
            return parts["weight"].float()
        from trtllm_cli.kernels.quantization import dequantize

        scale, zero, global_scale = (parts.get(role) for role in ROLES[1:])
        return dequantize(parts["weight"], self.name, scale, zero, global_scale, self.group_size)[..., :in_features]
