"""The row quantizers, one for each way in which models/stored.py stores a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from trtllm_cli.convert.quantize.rows import RowQuantizer
from trtllm_cli.convert.quantize.scales import (
    fp4_block_scales,
    fp8_scales,
    int4_scales,
    int4_symmetric_scales,
    int8_group_scales,
)
from trtllm_cli.kernels.quantization import FP8_MAX, LARGEST, fp4_codes, grouped, pack_nibbles
from trtllm_cli.models.stored import FP4_GROUP, FP8_BLOCK

TINY = 1e-30  # the smallest step: a row of zeros has one too


def _channel_steps(w: Tensor, largest: float) -> Tensor:
    """float32 [n]: each row's largest magnitude over the format's."""
    return w.abs().amax(dim=1).clamp_min(TINY) / largest


class _Int8(RowQuantizer):
    """int8, a scale per output, or with `per_group` (and GPTQ's name) per output and group of inputs."""

    def block(self, w: Tensor) -> dict[str, Tensor]:
        if self.layer.quant_algo == "W8A16" and not self.layer.per_group:
            scale = _channel_steps(w, 127.0)
            return {"weight": _round_int8(w / scale[:, None]), "per_channel_scale": scale}
        groups = grouped(w, self.layer.group_size)
        scale = int8_group_scales(groups)
        q = _round_int8(groups / scale[..., None]).flatten(1)[:, : w.shape[1]]
        parts = {"weight": q, "weights_scaling_factor": scale}
        return parts | {"zero": torch.zeros_like(scale)} if self.layer.has_zero_point else parts


def _round_int8(values: Tensor) -> Tensor:
    return values.round().clamp_(-127, 127).to(torch.int8)


class _Int4(RowQuantizer):
    """Four bits in groups; a zero for each group where the layer has them, weighed by the inputs' importance."""

    def block(self, w: Tensor) -> dict[str, Tensor]:
        groups = grouped(w, self.layer.group_size)
        weights = self.importance(self.layer.group_size)
        if self.layer.has_zero_point:
            q, scale, zero = int4_scales(groups, weights)
        else:
            q, scale = int4_symmetric_scales(groups, weights)
        packed = pack_nibbles(q.to(torch.uint8).flatten(1)[:, : w.shape[1]])
        parts = {"weight": packed, "weights_scaling_factor": scale}
        return parts | {"zero": zero} if self.layer.has_zero_point else parts


class _Int4Fp8(_Int4):
    """W4A8_AWQ: int4 weights and activations in fp8 of one scale."""

    def make_fixed(self) -> dict[str, Tensor]:
        return super().make_fixed() | {"activation_scaling_factor": self.steps(self.calibration.input_amax, FP8_MAX)}


class _Fp8(RowQuantizer):
    """E4M3, one scale for the weight and one for the activations."""

    def make_fixed(self) -> dict[str, Tensor]:
        return super().make_fixed() | {
            "weights_scaling_factor": self.steps(self.calibration.weight_amax, FP8_MAX),
            "activation_scaling_factor": self.steps(self.calibration.input_amax, FP8_MAX),
        }

    def block(self, w: Tensor) -> dict[str, Tensor]:
        return {"weight": _round_fp8(w / self.fixed["weights_scaling_factor"].flatten()[0])}


def _round_fp8(values: Tensor) -> Tensor:
    return values.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


class _Fp8Channels(RowQuantizer):
    """E4M3, a scale per output; activations find theirs by token."""

    def block(self, w: Tensor) -> dict[str, Tensor]:
        scale = fp8_scales(w[:, None], self.importance(w.shape[1]))[:, 0]
        return {"weight": _round_fp8(w / scale[:, None]), "per_channel_scale": scale}


class _Fp8Blocks(RowQuantizer):
    """E4M3, a scale per output and 128 inputs; the last block may be short."""

    def block(self, w: Tensor) -> dict[str, Tensor]:
        groups = grouped(w, FP8_BLOCK)
        scale = fp8_scales(groups, self.importance(FP8_BLOCK))
        weight = _round_fp8(groups / scale[..., None]).flatten(1)[:, : w.shape[1]]
        return {"weight": weight.contiguous(), "weights_scaling_factor": scale}


class _SmoothInt8(RowQuantizer):
    """SmoothQuant (arXiv 2211.10438): int8 weights and activations, each by one scale or by row."""

    def make_fixed(self) -> dict[str, Tensor]:
        made, algo = super().make_fixed(), self.layer.quant_algo
        if not algo.endswith("PER_TOKEN_PLUGIN"):
            made["activation_scaling_factor"] = self.steps(self.calibration.input_amax, LARGEST["int8"])
        if algo.startswith("W8A8_SQ_PER_TENSOR"):
            made["weights_scaling_factor"] = self.steps(self.calibration.weight_amax, LARGEST["int8"])
        return made

    def block(self, w: Tensor) -> dict[str, Tensor]:
        if "weights_scaling_factor" in self.fixed:
            return {"weight": _round_int8(w / self.fixed["weights_scaling_factor"].flatten()[0])}
        scale = _channel_steps(w, 127.0)
        return {"weight": _round_int8(w / scale[:, None]), "weights_scaling_factor": scale}


class _Fp4(RowQuantizer):
    """NVFP4: E2M1 in groups of 16 whose scales are E4M3 numbers, times one float32."""

    def make_fixed(self) -> dict[str, Tensor]:
        largest = LARGEST["fp4"] * FP8_MAX
        return super().make_fixed() | {
            "weights_scaling_factor_2": self.steps(self.calibration.weight_amax, largest),
            "activation_scaling_factor": self.steps(self.calibration.input_amax, largest),
        }

    def block(self, w: Tensor) -> dict[str, Tensor]:
        global_scale = self.fixed["weights_scaling_factor_2"].flatten()[0]
        groups = grouped(w / global_scale, FP4_GROUP)
        scale = fp4_block_scales(groups, self.importance(FP4_GROUP))
        codes = fp4_codes(groups / scale.float().clamp_min(TINY)[..., None]).flatten(1)[:, : w.shape[1]]
        return {"weight": pack_nibbles(codes), "weights_scaling_factor": scale}


FORMATS: dict[str, type[RowQuantizer]] = {
    "W8A16": _Int8,
    "W8A16_GPTQ": _Int8,
    "W4A16": _Int4,
    "W4A16_GPTQ": _Int4,
    "W4A16_AWQ": _Int4,
    "W4A8_AWQ": _Int4Fp8,
    "FP8": _Fp8,
    "FP8_PER_CHANNEL_PER_TOKEN": _Fp8Channels,
    "FP8_BLOCK_SCALES": _Fp8Blocks,
    "W8A8_SQ_PER_CHANNEL": _SmoothInt8,
    "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN": _SmoothInt8,
    "W8A8_SQ_PER_TENSOR_PLUGIN": _SmoothInt8,
    "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": _SmoothInt8,
    "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN": _SmoothInt8,
    "NVFP4": _Fp4,
}
