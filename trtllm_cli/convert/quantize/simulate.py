"""One linear as an engine will compute it, on the rows that calibration kept: what a format costs this layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trtllm_cli import functional
from trtllm_cli.convert.quantize.rows import LayerCalibration, row_quantizer
from trtllm_cli.kernels.reference import Reference
from trtllm_cli.mapping import Mapping
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.models.stored import declare
from trtllm_cli.quant_config import LayerQuant, QuantConfig


def quantized_output(layer: LayerQuant, weight: Tensor, calibration: LayerCalibration, x: Tensor) -> Tensor:
    """float32 [tokens, out]: `x` [tokens, in] by `weight` [out, in] in the format `layer`."""
    quantizer = row_quantizer(layer, tuple(weight.shape), calibration)
    parts = quantizer.fixed | quantizer(weight)
    config = _CONFIG.model_copy(update={"quantization": QuantConfig(**layer.model_dump())})
    with functional.trace("linear") as t:
        ids = t.input("input_ids")
        rows = functional.embedding(ids, functional.weight("x", tuple(x.shape), "float32"))
        stored = declare(config, Mapping().ranks[0], "l", weight.shape[0], weight.shape[1], None)
        graph = t.finish(functional.linear(stored.prepare(rows), stored.weight, **stored.op_args))
    weights = {name: x if name == "x" else parts[name.removeprefix("l.")] for name in graph.weights}
    reference = Reference(graph, weights, num_slots=1, block_size=1)
    return reference.step({"input_ids": torch.arange(len(x), dtype=torch.int32)})[0]


_FIELDS: dict[str, Any] = {
    "architecture": "", "dtype": "float32", "vocab_size": 1, "hidden_size": 1, "num_hidden_layers": 1,
    "num_attention_heads": 1, "rotary_embedding_dim": 0, "head_size": 2, "hidden_act": "silu",
}  # fmt: skip
_CONFIG = ModelConfig.model_validate(_FIELDS)
