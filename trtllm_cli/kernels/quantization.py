"""Weight quantization as pure tensor functions, and what undoes each; functional.linear says how weights are stored.

A quantized weight keeps the checkpoint's layout: int8 or fp8 [out, in], or four bits two to a byte [out, in / 2], the
even column in the low nibble; with one scale, a scale per output, or a scale per output and group of inputs.
"""

from __future__ import annotations

import itertools

import torch


def quantize_int8(weight: torch.Tensor, group_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [out, in] -> int8 [out, in] and float32 scale [out], or with `group_size` [out, ceil(in / group_size)].

    Symmetric, the scale is max|w| / 127. Measured on small Llama models, a scale per output costs 0.7% of perplexity.
    """
    w = weight.float()
    if group_size is None:
        scale = w.abs().amax(dim=1).clamp_min(1e-30) / 127.0
        return torch.round(w / scale[:, None]).clamp_(-127, 127).to(torch.int8), scale
    groups = grouped(w, group_size)
    scale = groups.abs().amax(dim=2).clamp_min(1e-30) / 127.0
    values = torch.round(groups / scale[..., None]).clamp_(-127, 127).to(torch.int8)
    return values.flatten(1)[:, : w.shape[1]].contiguous(), scale


def quantize_fp8(weight: torch.Tensor, group_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [out, in] -> float8_e4m3fn [out, in] and float32 scale [out] or [out, ceil(in / group_size)].

    The scale is max|w| / 448.
    """
    groups = grouped(weight.float(), group_size or weight.shape[1])
    scale = groups.abs().amax(dim=2).clamp_min(1e-30) / FP8_MAX
    values = (groups / scale[..., None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    values = values.flatten(1)[:, : weight.shape[1]].contiguous()
    return values, scale if group_size else scale.squeeze(1)


def quantize_int4(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """weight [out, in] -> uint8 [out, ceil(in / 2)], float32 scale and zero [out, ceil(in / group_size)].

    A group's 16 levels run evenly from its smallest to its largest weight, so weights that are on such levels already
    (GGUF's Q4_1) come back as they were. `zero` is in levels and not rounded: w = (q - zero) * scale. A last group may
    be short.
    """
    groups = grouped(weight.float(), group_size)
    low, high = groups.aminmax(dim=2)
    scale = ((high - low) / 15.0).clamp_min(1e-30)
    # One level, and no weight at all: a group of equal weights is level 1 of a scale as large as the weight.
    flat = high == low
    scale = torch.where(flat & (low != 0), low.abs(), scale)
    zero = torch.where(flat, torch.where(low > 0, 0.0, torch.where(low < 0, 2.0, 1.0)), -low / scale)
    q = torch.round(groups / scale[..., None] + zero[..., None]).clamp_(0, 15).to(torch.uint8)
    return pack_nibbles(q.flatten(1)[:, : weight.shape[1]]), scale, zero


def pack_nibbles(values: torch.Tensor) -> torch.Tensor:
    """uint8 [out, in] below 16 -> uint8 [out, ceil(in / 2)], the even column in the low nibble."""
    if values.shape[1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    return values[:, 0::2] | (values[:, 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """What undoes pack_nibbles: uint8 [..., out, in_features]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :in_features]


def grouped(values: torch.Tensor, group_size: int) -> torch.Tensor:
    """[out, in] -> [out, groups, group_size]; a short last group repeats its last column."""
    missing = -values.shape[1] % group_size
    if missing:
        values = torch.cat([values, values[:, -1:].expand(-1, missing)], dim=1)
    return values.unflatten(1, (-1, group_size))


FP8_MAX = 448.0  # E4M3
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1, without the sign that is the nibble's top bit
LARGEST = {"fp8": FP8_MAX, "int8": 127.0, "fp4": 6.0}


def dequantize(
    weight: torch.Tensor,
    quant: str | None,
    scale: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
    group_size: int | None = None,
) -> torch.Tensor:
    """float32 [..., out, in] of a weight as functional.linear takes it, any leading dimensions before it."""
    if quant is None:
        return weight.float()
    assert scale is not None
    if quant in ("int4", "fp4"):
        nibbles = unpack_nibbles(weight, 2 * weight.shape[-1])
        values = nibbles.float() if quant == "int4" else fp4_values(nibbles)
    else:
        values = weight.float()
    factors = scale.float()
    if global_scale is not None:
        factors = factors * global_scale.float()[..., None]
    if group_size is None:
        if factors.ndim == values.ndim - 1:
            rows, count = values.shape[-2], factors.shape[-1]
            factors = (factors if count in (1, rows) else factors.repeat_interleave(rows // count, dim=-1))[..., None]
        return values * factors
    width = values.shape[-1]
    factors = factors.repeat_interleave(group_size, dim=-1)[..., :width]
    if quant == "int4" or zero is not None:
        values = values - (8.0 if zero is None else zero.float().repeat_interleave(group_size, dim=-1)[..., :width])
    return values * factors


def fp4_values(nibbles: torch.Tensor) -> torch.Tensor:
    """float32 of E2M1 numbers, uint8 below 16 each."""
    values = torch.tensor(FP4_VALUES, device=nibbles.device)
    return torch.cat([values, -values])[nibbles.long()]


def fp4_codes(values: torch.Tensor) -> torch.Tensor:
    """uint8 below 16: the nearest E2M1 number's code, its sign in bit 3; what undoes fp4_values."""
    rounded = round_to(values, "fp4")
    midpoints = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(FP4_VALUES)])
    return (torch.bucketize(rounded.abs(), midpoints) + 8 * torch.signbit(values)).to(torch.uint8)


def round_to(x: torch.Tensor, fmt: str) -> torch.Tensor:
    """float32 `x` rounded to the nearest number of "fp8", "int8" or "fp4", what is larger to the largest."""
    largest = LARGEST[fmt]
    x = x.clamp(-largest, largest)
    match fmt:
        case "int8":
            return x.round()
        case "fp8":
            return x.to(torch.float8_e4m3fn).float()
    # To even mantissas at ties: 0.25 -> 0, 0.75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4, 5 -> 4.
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (size / step).round() * step * x.sign()


def qdq(x: torch.Tensor, scale: torch.Tensor | None, fmt: str, group_size: int | None = None) -> torch.Tensor:
    """functional.qdq, on float32 [rows, width]."""
    scale = None if scale is None else scale.amax()
    if scale is not None and fmt != "fp4":
        return round_to(x / scale, fmt) * scale
    parts = grouped(x, group_size or x.shape[-1])
    steps = parts.abs().amax(dim=-1, keepdim=True) / LARGEST[fmt]
    if scale is not None:
        steps = round_to(steps / scale, "fp8") * scale
    steps = steps.clamp_min(1e-30)
    return (round_to(parts / steps, fmt) * steps).flatten(-2)[..., : x.shape[-1]]
