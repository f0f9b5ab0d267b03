"""A linear layer through torch's own CPU kernels: the fallback where there is no C++ compiler."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trtllm_cli.kernels.linear_format import LinearFormat
from trtllm_cli.kernels.quantization import unpack_nibbles

INT4_GROUPS = (32, 64, 128, 256)  # that torch's int4 kernel takes; another group is dequantized on loading


class TorchLinear:
    """A weight as torch's kernels want it: `parts` by role as a checkpoint or `LinearFormat.quantize` has them.

    int8 with a scale for each output and int4 have kernels, other formats are dequantized to bfloat16. With `widen`
    all are kept in float32: without AVX-512, torch's bfloat16 and packed kernels are 10 to 100 times slower than that,
    so it is the default there.
    """

    def __init__(
        self, fmt: LinearFormat, parts: Mapping[str, Tensor], in_features: int, *, widen: bool | None = None
    ) -> None:
        if widen is None:
            widen = torch.backends.cpu.get_cpu_capability() != "AVX512"
        weight = parts["weight"]
        self.in_features, self.out_features = in_features, len(weight)
        self.kernel, self.group_size = "plain", fmt.group_size
        if widen or not self._has_kernel(fmt, parts, in_features):
            wide = widen or fmt.name == "float32"
            self.weight = fmt.dequantize(parts, in_features).to(torch.float32 if wide else torch.bfloat16)
        elif fmt.name == "int8":
            self.kernel, self.weight, self.scales = "int8", weight, parts["scale"].bfloat16()
        else:
            self.kernel = "int4"
            nibbles = unpack_nibbles(weight, in_features).int()
            self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1)
            # torch takes `(q - 8) * scale + minimum`, both bfloat16 [groups, out, 2].
            scale = parts["scale"].float()
            minimum = (8.0 - parts["zero"].float()) * scale if "zero" in parts else torch.zeros_like(scale)
            self.scales = torch.stack([scale, minimum], dim=-1).transpose(0, 1).contiguous().bfloat16()

    @staticmethod
    def _has_kernel(fmt: LinearFormat, parts: Mapping[str, Tensor], in_features: int) -> bool:
        outputs = len(parts["weight"])
        if fmt.name == "int8":
            return fmt.group_size is None and len(parts["scale"]) == outputs
        return fmt.name == "int4" and fmt.group_size in INT4_GROUPS and in_features % fmt.group_size + outputs % 16 == 0

    def __call__(self, x: Tensor) -> Tensor:
        """float32 x [rows, in] to float32 [rows, out]. All but float32 weights round x to bfloat16."""
        match self.kernel:
            case "int8":
                return torch._weight_int8pack_mm(x.bfloat16(), self.weight, self.scales).float()
            case "int4":
                return torch.ops.aten._weight_int4pack_mm_for_cpu(
                    x.bfloat16(), self.weight, self.group_size, self.scales
                ).float()
            case _:
                return torch.nn.functional.linear(x.to(self.weight.dtype), self.weight).float()
