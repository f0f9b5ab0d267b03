"""The other calibrator: NVIDIA's ModelOpt on the traced program, its ranges and scales read out of its quantizers.

https://github.com/NVIDIA/Model-Optimizer. It is an extra, `pip install 'trtllm-cli[quantize]'`, and imported only here.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from trtllm_cli.convert.quantize.rows import Calibration, LayerCalibration
from trtllm_cli.errors import ResourceError, UnsupportedError
from trtllm_cli.quant_config import QuantConfig

if TYPE_CHECKING:
    from torch import Tensor

    from trtllm_cli.convert.quantize.statistics import Progress
    from trtllm_cli.evaluate.program import Program

_PRESETS = {
    "FP8": "FP8_DEFAULT_CFG",
    "FP8_PER_CHANNEL_PER_TOKEN": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "W4A16_AWQ": "INT4_AWQ_CFG",
    "W4A8_AWQ": "W4A8_AWQ_BETA_CFG",
    "NVFP4": "NVFP4_DEFAULT_CFG",
}


def calibrate_layers(
    program: Program, windows: Tensor, config: QuantConfig, batch_size: int, progress: Progress | None
) -> Calibration:
    """What ModelOpt finds for every layer that `config` quantizes.

    The program itself is left as it is. Raises ResourceError without ModelOpt, UnsupportedError for experts, and for
    formats that ModelOpt has no preset for.
    """
    from trtllm_cli.convert.quantize.calibrate import kv_scales
    from trtllm_cli.convert.quantize.statistics import collect

    if any(config.layer_quant(name) for name in program.expert_linears):
        raise UnsupportedError(
            "ModelOpt does not see the experts of this program", where="--calibrator", fix="--calibrator trtllm"
        )
    quantized = quantize(program, windows, config, batch_size, progress)
    layers = {name: _read(module) for name, module in quantized.linears.items() if config.layer_quant(name)}
    cache: dict[str, list[float]] = {}
    if config.kv_cache_quant_algo is not None:
        cache = collect(program, windows, set(), batch_size=batch_size, kv=True, progress=None).kv
    return Calibration(layers, kv_scales(cache, config))


def quantize(
    program: Program, windows: Tensor, config: QuantConfig, batch_size: int = 4, progress: Progress | None = None
) -> Program:
    """A copy of the program with ModelOpt's quantizers in it, calibrated: its outputs are ModelOpt's fake-quantized."""
    batches = windows.split(batch_size)

    def forward(model: Program) -> None:
        for i, batch in enumerate(batches):
            model.hidden(batch)
            if config.layer_quant("lm_head"):
                model.head(model.hidden(batch)[:, ::8])
            if progress is not None:
                progress("calibrate with ModelOpt", i + 1, len(batches))

    with _quietly():
        import torch

        mtq = _import()
        model = copy.deepcopy(program)
        with torch.no_grad():
            mtq.quantize(model, _config(mtq, config, model), forward)
    return model


def _import() -> Any:
    try:
        import modelopt.torch.quantization as mtq
    except ImportError as e:
        raise ResourceError(
            f"calibrating with ModelOpt needs nvidia-modelopt ({e})",
            where="--calibrator modelopt",
            fix="pip install 'trtllm-cli[quantize]', or --calibrator trtllm, which needs nothing more",
        ) from None
    return mtq


def _config(mtq: Any, config: QuantConfig, model: Program) -> dict[str, Any]:
    algo = config.quant_algo or ""
    preset = "INT8_SMOOTHQUANT_CFG" if algo.startswith("W8A8_SQ") else _PRESETS.get(algo)
    if preset is None:
        raise UnsupportedError(f"ModelOpt is not asked for {algo}", where="--calibrator", fix="--calibrator trtllm")
    made: dict[str, Any] = copy.deepcopy(getattr(mtq, preset))
    if algo in ("W4A16_AWQ", "W4A8_AWQ"):
        _set_group_size(made["quant_cfg"], config.group_size)
    # It takes `mlp.gate`, which is an MLP's up projection here, for a router, and leaves it out like the head.
    made["quant_cfg"] = [e for e in made["quant_cfg"] if not re.search(r"mlp\.gate\.|lm_head", e["quantizer_name"])]
    left_out = [name for name in model.linears if config.layer_quant(name) is None]
    made["quant_cfg"] += [{"quantizer_name": f"{name}.*", "enable": False} for name in left_out]
    return made


def _set_group_size(entries: list[dict[str, Any]], group_size: int) -> None:
    for entry in entries:
        parts = entry.get("cfg") or []
        for part in parts if isinstance(parts, list) else [parts]:
            if part.get("block_sizes"):
                part["block_sizes"] = {**part["block_sizes"], -1: group_size}


def _read(module: Any) -> LayerCalibration:
    """Ranges and scales of a linear that ModelOpt has calibrated."""
    inputs, weights = module.input_quantizer, module.weight_quantizer
    scale = getattr(inputs, "pre_quant_scale", None)
    input_amax, weight_amax = getattr(inputs, "amax", None), getattr(weights, "amax", None)
    return LayerCalibration(
        input_amax=None if input_amax is None else float(input_amax.max()),
        pre_scale=None if scale is None else scale.detach().float().flatten().cpu(),
        weight_amax=float((module.weight if weight_amax is None else weight_amax).abs().max()),
    )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """ModelOpt warns and prints of much that is no news: here it does neither."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
