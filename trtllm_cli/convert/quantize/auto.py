"""A format for each layer, so that the average of bits stays within a budget and the estimated loss is least.

The estimate is second order, as in HAWQ-V2 (arXiv 1911.03852) and ModelOpt's auto_quantize: a layer's loss is half the
sum of its outputs' squared errors, each times the Fisher information of that output: the mean square of the gradient of
the log-likelihood of tokens that the model itself draws. In nats a token; errors of layers add up.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trtllm_cli.convert.quantize.calibrate import CalibrationOptions, kv_scales
from trtllm_cli.convert.quantize.formats import Linear, layer_quant
from trtllm_cli.convert.quantize.rows import Calibration, LayerCalibration, Quantized, effective_bits
from trtllm_cli.convert.quantize.search import Weighted, calibrate_group, output_error
from trtllm_cli.convert.quantize.statistics import InputStats, Progress, collect
from trtllm_cli.errors import UsageError
from trtllm_cli.quant_config import KvCacheQuantAlgo, LayerQuant, QuantConfig

if TYPE_CHECKING:
    from trtllm_cli.evaluate.program import Program

DEFAULT_FORMATS = ("int4_awq", "fp8", "int8_wo")
_GRADIENT_WINDOWS = 8
PLAIN_BITS = 16.0


@dataclass(frozen=True)
class Choice:
    """One way to store one layer."""

    layer: LayerQuant | None  # None: as it is
    bits: float  # a weight, scales counted in
    loss: float  # estimated, nats a token
    calibration: LayerCalibration | None = None


@dataclass(frozen=True)
class AutoQuantized:
    """What was chosen."""

    quantized: Quantized
    bits: float  # on average over the weights that could be quantized
    loss: float  # estimated, nats a token
    counts: dict[str, int]  # algorithm -> layers


def auto_quantize(
    program: Program,
    windows: Tensor,
    linears: dict[str, Linear],
    formats: Sequence[str],
    bits: float,
    *,
    group_size: int | None = None,
    exclude: Sequence[str] = ("lm_head",),
    kv_cache: KvCacheQuantAlgo | None = None,
    options: CalibrationOptions | None = None,
    progress: Progress | None = None,
) -> AutoQuantized:
    """The best formats of `linears` (formats.linears) within `bits` on average.

    Raises UsageError if even the smallest formats take more.
    """
    modules: dict[str, Any] = dict(program.linears)
    names = [n for n in linears if n in modules and not any(fnmatch(n, pattern) for pattern in exclude)]
    batch_size = (options or CalibrationOptions()).batch_size
    found = collect(program, windows, set(names), batch_size=batch_size, kv=kv_cache is not None, progress=progress)
    information = fisher_information(program, windows[:_GRADIENT_WINDOWS], names, progress)
    choices: dict[str, list[Choice]] = {name: [Choice(None, PLAIN_BITS, 0.0)] for name in names}
    for i, (stats, qformat) in enumerate(itertools.product(found.inputs, formats)):
        for name, choice in _choices(stats, qformat, group_size, linears, modules, information):
            choices[name].append(choice)
        if progress is not None:
            progress("weigh formats", i + 1, len(found.inputs) * len(formats))
    sizes = {name: modules[name].weight.numel() for name in names}
    picked = within_budget(choices, sizes, bits)
    return _result(picked, sizes, list(exclude), kv_cache, found.kv)


def _choices(
    stats: InputStats,
    qformat: str,
    group_size: int | None,
    linears: dict[str, Linear],
    modules: dict[str, Any],
    information: dict[str, Tensor],
) -> Iterator[tuple[str, Choice]]:
    """The linears that read one input, in one format."""
    layers = {name: layer_quant(qformat, group_size, name, linears[name]) for name in stats.modules}
    weighted = [Weighted(n, layer, modules[n].weight.detach().cpu()) for n, layer in layers.items() if layer]
    if not weighted:
        return
    made = calibrate_group(stats, weighted)
    for linear in weighted:
        error = output_error(linear, made[linear.name], stats.rows, information[linear.name])
        bits = effective_bits(linear.layer, tuple(linear.weight.shape))
        yield linear.name, Choice(linear.layer, bits, error / (2 * len(stats.rows)), made[linear.name])


def fisher_information(
    program: Program, windows: Tensor, names: Sequence[str], progress: Progress | None = None
) -> dict[str, Tensor]:
    """float32 [out] of each linear: the mean square over tokens of the gradient of the log-likelihood by its output."""
    sums: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad(), _gradients(program, names, sums):
        for i, ids in enumerate(windows):
            logits = program(ids[None])[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
            torch.nn.functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum").backward()
            if progress is not None:
                progress("weigh outputs", i + 1, len(windows))
    tokens = windows.numel()
    return {name: (total / tokens).cpu() for name, total in sums.items()}


@contextmanager
def _gradients(program: Program, names: Sequence[str], sums: dict[str, Tensor]) -> Iterator[None]:
    modules: dict[str, Any] = dict(program.linears)
    hooks = []
    for name in names:

        def watch(_: Any, __: Any, y: Tensor, name: str = name) -> None:
            def add(gradient: Tensor) -> None:
                square = gradient.float().square().flatten(0, -2).sum(0)
                sums[name] = sums[name] + square if name in sums else square

            if not y.requires_grad:
                y.requires_grad_()
            y.register_hook(add)

        hooks.append(modules[name].register_forward_hook(watch))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def within_budget(choices: dict[str, list[Choice]], sizes: dict[str, int], bits: float) -> dict[str, Choice]:
    """One choice for each layer, on average at most `bits`: bits go where each lowers the loss the most.

    A layer's choices are climbed along their lower convex hull, which is the optimum but for the last step.
    """
    ladders = {name: _hull(options) for name, options in choices.items()}
    at = dict.fromkeys(ladders, 0)
    left = bits * sum(sizes.values()) - sum(ladder[0].bits * sizes[name] for name, ladder in ladders.items())
    if left < -1e-6 * sum(sizes.values()):
        least = sum(ladder[0].bits * sizes[name] for name, ladder in ladders.items()) / sum(sizes.values())
        raise UsageError(
            f"{bits} bits on average cannot be reached: with these formats it is at least {least:.2f}",
            where="--auto-quantize-bits",
            fix="give more bits, or smaller formats by --autoq-format",
        )
    steps = [
        ((low.loss - high.loss) / ((high.bits - low.bits) * sizes[name]), name, i + 1)
        for name, ladder in ladders.items()
        for i, (low, high) in enumerate(itertools.pairwise(ladder))
    ]
    for _, name, step in sorted(steps, key=lambda s: (-s[0], s[2])):
        cost = (ladders[name][step].bits - ladders[name][step - 1].bits) * sizes[name]
        if at[name] == step - 1 and cost <= left:
            at[name], left = step, left - cost
    return {name: ladder[at[name]] for name, ladder in ladders.items()}


def _hull(options: list[Choice]) -> list[Choice]:
    """The choices on the lower convex hull of loss over bits, fewest bits first."""
    hull: list[Choice] = []
    for option in sorted(options, key=lambda o: (o.bits, o.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], option) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(low: Choice, high: Choice) -> float:
    return (high.loss - low.loss) / max(high.bits - low.bits, 1e-9)


def _result(
    picked: dict[str, Choice],
    sizes: dict[str, int],
    exclude: list[str],
    kv_cache: KvCacheQuantAlgo | None,
    largest: dict[str, list[float]],
) -> AutoQuantized:
    layers = {name: choice.layer for name, choice in picked.items() if choice.layer is not None}
    config = QuantConfig(
        quant_algo="MIXED_PRECISION", quantized_layers=layers, exclude_modules=exclude, kv_cache_quant_algo=kv_cache
    )
    calibrations = {n: c.calibration for n, c in picked.items() if c.layer is not None and c.calibration is not None}
    counts: dict[str, int] = {}
    for choice in picked.values():
        algo = choice.layer.quant_algo if choice.layer else "not quantized"
        counts[algo] = counts.get(algo, 0) + 1
    return AutoQuantized(
        Quantized(config, Calibration(calibrations, kv_scales(largest, config))),
        sum(choice.bits * sizes[name] for name, choice in picked.items()) / sum(sizes.values()),
        sum(choice.loss for choice in picked.values()),
        counts,
    )
