"""Scales for a model of random weights, on which calibration would mean nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_cli.convert.plan import whole_weights
from trtllm_cli.convert.quantize.calibrate import kv_scales
from trtllm_cli.convert.quantize.formats import linears
from trtllm_cli.convert.quantize.rows import Calibration, LayerCalibration

if TYPE_CHECKING:
    from trtllm_cli.model_config import ModelConfig
    from trtllm_cli.quant_config import QuantConfig

INPUT_AMAX = 6.0  # six standard deviations: inputs are taken to be normal, of deviation one, as they leave a norm


def assumed_calibration(quantization: QuantConfig, config: ModelConfig, weight_amax: float) -> Calibration:
    """What calibration would have found if every linear's input, key and value were normal with deviation one.

    Larger ones are clipped. `weight_amax` is the largest magnitude of a weight; no input is scaled before its layer.
    """
    import torch

    layers, weights = {}, whole_weights(config)
    for module in linears(config):
        if (layer := quantization.layer_quant(module)) is not None:
            pre_scale = torch.ones(weights[f"{module}.weight"].shape[-1]) if layer.pre_quant_scale else None
            layers[module] = LayerCalibration(INPUT_AMAX, pre_scale, weight_amax)
    attentions = [f"transformer.layers.{i}.attention" for i in range(config.num_hidden_layers)]
    return Calibration(layers, kv_scales({name: [INPUT_AMAX, INPUT_AMAX] for name in attentions}, quantization))
