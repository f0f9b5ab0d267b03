"""The scale of each group of weights: searched, where that is better than the group's largest weight says.

Each search minimizes the squared error of the dequantized group, times `weights` (the inputs' importance) where given:
the objective of AWQ's clipping (arXiv 2306.00978) and of llama.cpp's importance matrices. Groups are float32
[out, groups, group_size]; `weights` broadcasts to them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trtllm_cli.kernels.quantization import FP8_MAX, round_to

TINY = 1e-30
# Steps from a group's smallest to its largest weight. Below 15: weights that lie on fewer levels than there are stay
# exactly as they were. Above: the ends are clipped, and the rest is finer.
_STEPS = (15.0, 14.0, 13.0, 12.0, 11.0, 10.0, 9.0, 8.0, 7.0, 15.7, 16.5, 17.5, 19.0)
_FP8_TRIALS = 24  # scales within an octave
_REFINEMENTS = 2
_SYMMETRIC = (7.0, 7.5, 8.0, 8.5, 9.0, 10.0)  # the largest magnitude, in steps


def int4_scales(groups: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(levels 0..15 as float, scale, zero): w = (level - zero) * scale, scale and zero [out, groups]."""
    low, high = groups.aminmax(dim=2)
    spread = high - low
    best = None
    for steps in _STEPS:
        scale = (spread / steps).clamp_min(TINY)
        start = low + (spread - 15.0 * scale).clamp_min(0) / 2 if steps > 15 else low
        best = _better(groups, weights, scale, start, best)
    assert best is not None
    for _ in range(_REFINEMENTS):
        scale, start = _least_squares(groups, weights, best[1])
        best = _better(groups, weights, scale, start, best)
    _, q, scale, start = best
    return _flat_groups(low, high, q, scale, -start / scale)


_Fit = tuple[Tensor, Tensor, Tensor, Tensor]  # error [out, groups], levels, scale, what level 0 is


def _better(groups: Tensor, weights: Tensor | None, scale: Tensor, start: Tensor, best: _Fit | None) -> _Fit:
    """The better of two fits, for each group."""
    q = ((groups - start[..., None]) / scale[..., None]).round_().clamp_(0, 15)
    error = _error(q * scale[..., None] + start[..., None] - groups, weights)
    if best is None:
        return error, q, scale, start
    won = error < best[0]
    return (
        torch.where(won, error, best[0]),
        torch.where(won[..., None], q, best[1]),
        torch.where(won, scale, best[2]),
        torch.where(won, start, best[3]),
    )


def _error(difference: Tensor, weights: Tensor | None) -> Tensor:
    square = difference.square_()
    return (square if weights is None else square * weights).sum(dim=2)


def _least_squares(groups: Tensor, weights: Tensor | None, q: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, start) that make q * scale + start the nearest to the group."""
    h = torch.ones_like(groups[:1]) if weights is None else weights
    total = h.sum(dim=2)
    mean_q, mean_w = (h * q).sum(dim=2) / total, (h * groups).sum(dim=2) / total
    centered = q - mean_q[..., None]
    slope = (h * centered * groups).sum(dim=2) / (h * centered * centered).sum(dim=2).clamp_min(TINY)
    slope = slope.clamp_min(TINY)
    return slope, mean_w - slope * mean_q


def _flat_groups(low: Tensor, high: Tensor, q: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A group of equal weights is one level of a scale as large as the weight."""
    flat = high == low
    scale = torch.where(flat, low.abs().clamp_min(TINY), scale)
    zero = torch.where(flat, torch.where(low > 0, 0.0, torch.where(low < 0, 2.0, 1.0)), zero)
    return torch.where(flat[..., None], 1.0, q), scale, zero


def int4_symmetric_scales(groups: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(levels 0..15 as float, scale): w = (level - 8) * scale, scale [out, groups]."""
    largest = groups.abs().amax(dim=2).clamp_min(TINY)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for steps in _SYMMETRIC:
        scale = largest / steps
        q = (groups / scale[..., None]).round_().clamp_(-8, 7)
        error = _error(q * scale[..., None] - groups, weights)
        if best is None:
            best = error, q, scale
            continue
        won = error < best[0]
        best = (
            torch.where(won, error, best[0]),
            torch.where(won[..., None], q, best[1]),
            torch.where(won, scale, best[2]),
        )
    assert best is not None
    return best[1] + 8, best[2]


def int8_group_scales(groups: Tensor) -> Tensor:
    """[out, groups]: the largest magnitude is 127 steps. At eight bits no search pays."""
    return groups.abs().amax(dim=2).clamp_min(TINY) / 127.0


def fp8_scales(groups: Tensor, weights: Tensor | None = None) -> Tensor:
    """[out, groups]: between the largest weight's being E4M3's largest number and half of it.

    E4M3 has eight numbers an octave, so what the step is within an octave decides how near each weight comes to one:
    nothing to choose for the sum of all weights, much where a few inputs matter more than the rest.
    """
    largest = groups.abs().amax(dim=2).clamp_min(TINY) / FP8_MAX
    if weights is None:
        return largest
    best_error, best = None, largest
    for i in range(_FP8_TRIALS):
        scale = largest * 2.0 ** (i / _FP8_TRIALS)
        error = fp8_error(groups, scale[..., None], weights)
        if best_error is None:
            best_error = error
            continue
        won = error < best_error
        best_error, best = torch.where(won, error, best_error), torch.where(won, scale, best)
    return best


def fp8_error(groups: Tensor, scale: Tensor, weights: Tensor | None) -> Tensor:
    """[out, groups]: the error of rounding to E4M3 steps of `scale`."""
    return _error((groups / scale).to(torch.float8_e4m3fn).float() * scale - groups, weights)


def fp4_block_scales(groups: Tensor, weights: Tensor | None = None) -> Tensor:
    """float8_e4m3fn [out, groups]: the largest weight becomes 6, 4 or something between, whichever errs least.

    E2M1 has nothing between 4 and 6, so that ending at 4 is finer for some groups.
    """
    largest = groups.abs().amax(dim=2)
    best_error = best = None
    for end in (6.0, 4.0, 5.0, 7.0):
        scale = (largest / end).clamp(max=FP8_MAX).to(torch.float8_e4m3fn).float()
        steps = scale.clamp_min(TINY)[..., None]
        error = _error(round_to(groups / steps, "fp4") * steps - groups, weights)
        if best_error is None or best is None:
            best_error, best = error, scale
            continue
        won = error < best_error
        best_error, best = torch.where(won, error, best_error), torch.where(won, scale, best)
    assert best is not None
    return best.to(torch.float8_e4m3fn)
