"""The scale of each input before a layer, and the range that its activations get: what errs least on the kept rows.

Inputs that are often large are multiplied by a smaller number, and their weights by a larger one: AWQ (arXiv
2306.00978) so that the weights that matter are rounded less, SmoothQuant (arXiv 2211.10438) so that activations have
no outliers. Both have an exponent between 0 and 1; here each group of layers that reads the same input tries several,
and takes the one whose outputs are the nearest. Exponent 0 of AWQ is no scaling at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trtllm_cli.convert.quantize.rows import LayerCalibration
from trtllm_cli.convert.quantize.scales import fp8_error
from trtllm_cli.convert.quantize.simulate import quantized_output
from trtllm_cli.convert.quantize.statistics import InputStats
from trtllm_cli.kernels.quantization import FP8_MAX
from trtllm_cli.quant_config import LayerQuant

_ROWS = 192  # outputs of a layer that a trial computes
_SMALLEST = 1e-5  # of a magnitude: an input that was never seen
_AWQ_EXPONENTS = (0.0, 0.15, 0.3, 0.5, 0.7)
_SMOOTH_EXPONENTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_FP8_STEPS = tuple(2.0 ** (i / 12) for i in range(12))  # of the range of a whole weight, or of the activations
_INT8_RANGES = (1.0, 0.85, 0.7, 0.55, 0.4)  # of the largest activation, where one step serves all tokens


@dataclass(frozen=True)
class Weighted:
    """A linear that is to be quantized, and its weight [..., out, in]."""

    name: str
    layer: LayerQuant
    weight: Tensor


def calibrate_group(stats: InputStats, linears: list[Weighted]) -> dict[str, LayerCalibration]:
    """What the linears that read the same input get."""
    made = {linear.name: _calibration(stats, linear, None) for linear in linears if not linear.layer.pre_quant_scale}
    scaled = [linear for linear in linears if linear.layer.pre_quant_scale]
    if scaled:
        trials = [_trial(stats, scaled, scale, fraction) for scale, fraction in _candidates(stats, scaled)]
        made |= min(trials, key=lambda trial: trial[0])[1]
    return made


def _candidates(stats: InputStats, linears: list[Weighted]) -> Iterator[tuple[Tensor, float]]:
    """(pre_scale [in], part of the largest activation that is the range) to try."""
    smooth = linears[0].layer.quant_algo.startswith("W8A8")
    largest = torch.stack([linear.weight.float().abs().flatten(0, -2).amax(0) for linear in linears]).amax(0)
    fixed_range = smooth and not linears[0].layer.quant_algo.endswith("PER_TOKEN_PLUGIN")
    for exponent in _SMOOTH_EXPONENTS if smooth else _AWQ_EXPONENTS:
        if smooth:
            scale = stats.largest.clamp_min(_SMALLEST) ** exponent / largest.clamp_min(_SMALLEST) ** (1 - exponent)
        else:
            scale = stats.mean_abs.clamp_min(_SMALLEST) ** exponent
        scale = (scale / (scale.max() * scale.min()).sqrt()).clamp(1e-4, 1e4)
        for fraction in _INT8_RANGES if fixed_range else (1.0,):
            yield 1 / scale, fraction


def _trial(
    stats: InputStats, linears: list[Weighted], scale: Tensor, fraction: float
) -> tuple[float, dict[str, LayerCalibration]]:
    made, error = {}, 0.0
    for linear in linears:
        calibration = _calibration(stats, linear, scale, fraction)
        made[linear.name] = calibration
        error += output_error(linear, calibration, stats.rows)
    return error, made


def _calibration(stats: InputStats, linear: Weighted, scale: Tensor | None, fraction: float = 1.0) -> LayerCalibration:
    factor = torch.ones(()) if scale is None else scale
    weight = linear.weight.float() if scale is None else linear.weight.float() / scale
    importance = stats.mean_square * factor.square()
    return LayerCalibration(
        input_amax=fraction * float((stats.largest * factor).max()),
        pre_scale=scale,
        weight_amax=_weight_range(linear.layer, weight, importance),
        importance=importance,
    )


def _weight_range(layer: LayerQuant, weight: Tensor, importance: Tensor) -> float:
    """The largest weight, or for one scale of fp8 numbers up to twice that, as the important inputs have it."""
    largest = float(weight.abs().max())
    if layer.quant_algo != "FP8" or not largest:
        return largest
    rows = weight.flatten(0, -2)
    groups, weights = rows[_some(len(rows)), None], importance[None, None]
    steps = [largest * step for step in _FP8_STEPS]
    errors = [float(fp8_error(groups, torch.tensor(step / FP8_MAX), weights).sum()) for step in steps]
    return steps[errors.index(min(errors))]


def output_error(
    linear: Weighted, calibration: LayerCalibration, rows: Tensor, output_weights: Tensor | None = None
) -> float:
    """The squared error of the layer's outputs for `rows` [n, in], of all of them by some of its outputs.

    With `output_weights` [out] each output's error is multiplied by its own.
    """
    weight = linear.weight.flatten(0, -2).float()
    chosen = _some(len(weight))
    part = weight[chosen]
    error = (quantized_output(linear.layer, part, calibration, rows) - rows @ part.T).square()
    if output_weights is not None:
        error = error * output_weights[chosen]
    return float(error.sum()) * len(weight) / len(chosen)


def _some(outputs: int) -> Tensor:
    """The outputs that a trial computes, evenly over all."""
    return torch.linspace(0, outputs - 1, min(_ROWS, outputs)).long()
