"""Rows of a linear's weight in the format that a checkpoint stores: a block at a time, so that memory stays small.

The parts that a row quantizer makes are those that models/stored.py declares, dtype and shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from trtllm_cli.errors import UnsupportedError
from trtllm_cli.quant_config import LayerQuant, QuantConfig

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 17  # elements quantized at once: what the search for scales touches again and again stays in the cache


@dataclass(frozen=True)
class LayerCalibration:
    """What calibration found out about one layer."""

    input_amax: float | None = None  # largest |activation| that is to be represented, after pre_scale
    pre_scale: Tensor | None = None  # float32 [in]: activations are multiplied by it, the weight's columns divided
    weight_amax: float | None = None  # largest |weight| that is to be represented, after pre_scale
    importance: Tensor | None = None  # float32 [in]: mean square of the activations after pre_scale


@dataclass(frozen=True)
class Calibration:
    """What calibration found out about a model."""

    layers: dict[str, LayerCalibration] = field(default_factory=dict)  # by module, in the whole model
    # "transformer.layers.N.attention" -> what a step of the cached k, and of the cached v, is worth
    kv_scales: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Quantized:
    """How a checkpoint is to be quantized, decided and calibrated."""

    config: QuantConfig
    calibration: Calibration = field(default_factory=Calibration)


class RowQuantizer:
    """Makes the stored parts of a layer. `shape` is the whole weight's: [out, in], or [experts, out, in].

    Blocks of rows must begin at multiples of `rows_multiple`. `fixed` are the parts that no row changes.
    """

    rows_multiple: ClassVar[int] = 1

    def __init__(self, layer: LayerQuant, shape: tuple[int, ...], calibration: LayerCalibration) -> None:
        self.layer, self.calibration, self.in_features = layer, calibration, shape[-1]
        self.experts = shape[0] if len(shape) > 2 else None
        self.fixed = self.make_fixed()

    def __call__(self, rows: Tensor) -> dict[str, Tensor]:
        """The parts of rows [n, in] of any float dtype, by the last part of their names."""
        import torch

        made: dict[str, list[Tensor]] = {}
        for block in rows.split(max(1, BLOCK // self.in_features)):
            block = block.float()
            if self.calibration.pre_scale is not None:
                block = block / self.calibration.pre_scale
            for name, part in self.block(block).items():
                made.setdefault(name, []).append(part)
        return {name: torch.cat(parts) for name, parts in made.items()}

    def block(self, w: Tensor) -> dict[str, Tensor]:
        """The parts of a few rows, float32 and divided by pre_scale."""
        raise NotImplementedError

    def make_fixed(self) -> dict[str, Tensor]:
        """The parts that no row changes."""
        if self.layer.pre_quant_scale:
            assert self.calibration.pre_scale is not None
            return {"prequant_scaling_factor": self.calibration.pre_scale.float()}
        assert self.calibration.pre_scale is None
        return {}

    def importance(self, group_size: int) -> Tensor | None:
        """[1, groups, group_size] of the inputs, where calibration has told; those a short group lacks are 0."""
        import torch

        found = self.calibration.importance
        if found is None:
            return None
        missing = -self.in_features % group_size
        return torch.nn.functional.pad(found, (0, missing)).reshape(1, -1, group_size)

    def scalar(self, value: float | None) -> Tensor:
        """float32 [1], or [experts, 1], of a number that calibration must have found."""
        import torch

        assert value is not None, f"{self.layer.quant_algo} needs calibration"
        return torch.full((1,) if self.experts is None else (self.experts, 1), value, dtype=torch.float32)

    def steps(self, largest: float | None, format_max: float) -> Tensor:
        """`scalar` of the step that brings `largest` to the format's largest number; never zero."""
        return self.scalar(None if largest is None else max(largest, 1e-30) / format_max)


def row_quantizer(
    layer: LayerQuant, shape: tuple[int, ...], calibration: LayerCalibration | None = None
) -> RowQuantizer:
    """The quantizer of a layer. Raises UnsupportedError for a format that conversion does not make."""
    from trtllm_cli.convert.quantize.row_formats import FORMATS

    kind = FORMATS.get(layer.quant_algo)
    if kind is None or layer.act_order:
        raise UnsupportedError(
            f"conversion does not quantize to {layer.quant_algo}{' with act_order' if layer.act_order else ''}",
            where="quantization.quant_algo",
            fix=f"it makes {', '.join(FORMATS)}",
        )
    return kind(layer, shape, calibration or LayerCalibration())


def effective_bits(layer: LayerQuant, shape: tuple[int, ...]) -> float:
    """Bits that a weight takes in this format, its share of the scales counted in."""
    import torch

    made = row_quantizer(layer, shape, _placeholder(layer, shape[-1]))(torch.zeros(1, shape[-1]))
    return 8 * sum(part.numel() * part.element_size() for part in made.values()) / math.prod((1, shape[-1]))


def _placeholder(layer: LayerQuant, in_features: int) -> LayerCalibration:
    import torch

    return LayerCalibration(1.0, torch.ones(in_features) if layer.pre_quant_scale else None, 1.0)
