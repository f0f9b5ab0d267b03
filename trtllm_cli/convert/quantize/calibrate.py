"""Calibration: text through the model, and for each layer what its format needs to know.

Written here and not left to nvidia-modelopt, which is the other calibrator (modelopt.py): it takes seconds where
importing ModelOpt alone takes ten, it searches the scales on the outputs of the very formats that engines compute, and
the ranges of a layer's weights can depend on what matters to its outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trtllm_cli.convert.quantize.rows import Calibration, LayerCalibration
from trtllm_cli.convert.quantize.search import Weighted, calibrate_group
from trtllm_cli.convert.quantize.statistics import Progress, collect
from trtllm_cli.kernels.quantization import LARGEST
from trtllm_cli.quant_config import QuantConfig

if TYPE_CHECKING:
    from torch import Tensor

    from trtllm_cli.evaluate.program import Program

Calibrator = Literal["trtllm", "modelopt"]


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate."""

    batch_size: int = 4  # windows at once
    calibrator: Calibrator = "trtllm"


def calibrate(
    program: Program,
    windows: Tensor,
    config: QuantConfig,
    options: CalibrationOptions | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """What every layer that `config` quantizes needs, of `windows` int64 [count, length] of tokens."""
    options = options or CalibrationOptions()
    linears: dict[str, Any] = {**program.linears, **program.expert_linears}
    layers = {name: layer for name in linears if (layer := config.layer_quant(name)) is not None}
    if options.calibrator == "modelopt":
        from trtllm_cli.convert.quantize.modelopt import calibrate_layers

        return calibrate_layers(program, windows, config, options.batch_size, progress)
    found = collect(
        program,
        windows,
        set(layers),
        batch_size=options.batch_size,
        kv=config.kv_cache_quant_algo is not None,
        progress=progress,
    )
    made: dict[str, LayerCalibration] = {}
    for i, stats in enumerate(found.inputs):
        made |= calibrate_group(
            stats, [Weighted(name, layers[name], linears[name].weight.detach().cpu()) for name in stats.modules]
        )
        if progress is not None:
            progress("search scales", i + 1, len(found.inputs))
    return Calibration(made, kv_scales(found.kv, config))


def kv_scales(largest: dict[str, list[float]], config: QuantConfig) -> dict[str, tuple[float, float]]:
    """The steps of the cached keys and values, of their largest magnitudes."""
    if config.kv_cache_quant_algo is None:
        return {}
    top = LARGEST[config.kv_cache_quant_algo.lower()]
    return {name: (max(k, 1e-30) / top, max(v, 1e-30) / top) for name, (k, v) in largest.items()}
