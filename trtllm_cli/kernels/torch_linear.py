"""A linear layer through torch's own CPU kernels: the fallback where there is no C++ compiler."""

from __future__ import annotations

import torch
from torch import Tensor

from trtllm_cli.kernels.quantization import dequantize_int4, dequantize_int8, unpack_nibbles

INT4_GROUPS = (32, 64, 128, 256)  # that torch's int4 kernel takes; another group is dequantized on loading


class TorchLinear:
    """A weight as torch's kernels want it.

    `fmt` is an engine.WeightDType. weight is [out, in]: float, int8 with scale [out], or uint4 two to a byte with scale
    and zero [out, groups] as kernels.quantization has them. With `widen` it is kept in float32: without AVX-512,
    torch's bfloat16 and packed kernels are 10 to 100 times slower than that, so it is the default there.
    """

    def __init__(
        self,
        fmt: str,
        weight: Tensor,
        in_features: int,
        scale: Tensor | None = None,
        zero: Tensor | None = None,
        *,
        widen: bool | None = None,
    ) -> None:
        self.fmt, self.weight = fmt, weight
        if widen if widen is not None else torch.backends.cpu.get_cpu_capability() != "AVX512":
            self._widen(in_features, scale, zero)
        elif fmt == "int8":
            assert scale is not None
            self.scale = scale.bfloat16()
        elif fmt == "int4":
            assert scale is not None
            assert zero is not None
            self._pack_int4(scale, zero, in_features)

    def _widen(self, in_features: int, scale: Tensor | None, zero: Tensor | None) -> None:
        if self.fmt == "int8":
            assert scale is not None
            self.weight = dequantize_int8(self.weight, scale)
        elif self.fmt == "int4":
            assert scale is not None
            group_size = in_features // scale.shape[1] if in_features % scale.shape[1] == 0 else None
            self.weight = dequantize_int4(self.weight, scale, zero, group_size, in_features)
        self.fmt, self.weight = "float32", self.weight.float()

    def _pack_int4(self, scale: Tensor, zero: Tensor, in_features: int) -> None:
        """torch takes `(q - 8) * scale + minimum`, both bfloat16 [groups, out, 2]."""
        self.group_size = in_features // scale.shape[1] if in_features % scale.shape[1] == 0 else 0
        if self.group_size not in INT4_GROUPS or self.weight.shape[0] % 16:
            self.fmt = "float32"
            self.weight = dequantize_int4(self.weight, scale, zero, self.group_size or None, in_features)
            return
        nibbles = unpack_nibbles(self.weight, in_features).int()
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1)
        minimum = (8.0 - zero) * scale
        self.scales = torch.stack([scale, minimum], dim=-1).transpose(0, 1).contiguous().bfloat16()

    def __call__(self, x: Tensor) -> Tensor:
        """float32 x [rows, in] to float32 [rows, out]. int8 and int4 round x to bfloat16."""
        match self.fmt:
            case "int8":
                return torch._weight_int8pack_mm(x.bfloat16(), self.weight, self.scale).float()
            case "int4":
                return torch.ops.aten._weight_int4pack_mm_for_cpu(
                    x.bfloat16(), self.weight, self.group_size, self.scales
                ).float()
            case _:
                return torch.nn.functional.linear(x.to(self.weight.dtype), self.weight).float()
