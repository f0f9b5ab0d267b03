"""Weight-only quantization at conversion: int8 a scale per output, int4 a scale and zero per group of inputs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from trtllm_cli.convert.plan import whole_weights
from trtllm_cli.errors import UnsupportedError
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.quant_config import QuantConfig

if TYPE_CHECKING:
    import torch

QFormat = Literal["int8_wo", "int4_wo"]
BLOCK = 1 << 22  # elements quantized at once


def quant_config(qformat: QFormat | None, group_size: int, config: ModelConfig) -> QuantConfig:
    """The checkpoint's `quantization`. For int4, the largest group up to `group_size` that divides every layer."""
    if qformat is None:
        return QuantConfig()
    if qformat == "int8_wo":
        return QuantConfig(quant_algo="W8A16", exclude_modules=["lm_head"])
    tp = config.mapping.tp_size
    widths = {
        weight.shape[1] // (tp if weight.shard == "columns" else 1)
        for weight in whole_weights(config).values()
        if weight.shard is not None and len(weight.shape) == 2
    }
    common = math.gcd(*widths)
    size = max((g for g in range(2, min(group_size, common) + 1, 2) if common % g == 0), default=0)
    if not size:
        raise UnsupportedError(
            f"no group size up to {group_size} divides the layers' inputs {sorted(widths)}",
            where="--group-size",
            fix="use --qformat int8_wo",
        )
    return QuantConfig(quant_algo="W4A16", group_size=size, has_zero_point=True, exclude_modules=["lm_head"])


def quantize(weight: torch.Tensor, quantization: QuantConfig) -> dict[str, torch.Tensor]:
    """The tensors that stand for `weight` [out, in], by the last part of their names; rows are done in blocks."""
    import torch

    from trtllm_cli.kernels.quantization import quantize_int4, quantize_int8

    blocks: list[tuple[torch.Tensor, ...]] = []
    names: tuple[str, ...] = ("weight", "per_channel_scale")
    if quantization.quant_algo == "W4A16":
        names = ("weight", "weights_scaling_factor", "zero")
    for block in weight.split(max(1, BLOCK // weight.shape[1])):
        if quantization.quant_algo == "W8A16":
            blocks.append(quantize_int8(block))
        else:
            blocks.append(quantize_int4(block, quantization.group_size))
    return {name: torch.cat(parts) for name, parts in zip(names, zip(*blocks, strict=True), strict=True)}
