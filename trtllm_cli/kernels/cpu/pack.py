"""Lays a linear layer's weight out for the cpu kernels: at build time, one weight at a time.

Outputs go in tiles of 16 side by side (the last one padded with zeros), inputs one after another, so that a kernel
streams a tile from its first byte to its last and multiplies 16 outputs by one broadcast input:

    float32   weight [tiles, in, 16] float32
    bfloat16  weight [tiles, ceil(in / 2), 16, 2] bfloat16, two inputs to a 32-bit lane
    int8      weight [tiles, in, 16] int8; scale [tiles, 16] float32
    fp8       weight [tiles, in, 16] uint8, E4M3's bits; scale [tiles, 16] float32
    fp4       as bfloat16, which holds its numbers times the scales of groups; scale [tiles, 16] float32, the global one

With a scale for each group of inputs a tile is a row of bytes, weight [tiles, bytes] uint8: for each group [16] scales
and then its weights, a short last group padded with zeros; and where groups have minima, [groups, 16] of them last.

    int4      ceil(group_size / 8) times [16] 32-bit words, each with 8 inputs of one output from its lowest nibble up;
              scales and minima float16, scale [tiles, 16] float32, a power of two
    int8      [group_size, 16] int8; scales, minima and scale as int4's
    fp8       [group_size, 16]; scales float32, and no scale beside them

A weight is `(value * scale16 + minimum16) * scale`: float16 scales and minima come through as they are, others lose
less than 2^-11 of themselves (unless they are 2^28 times smaller than their output's largest). fp8's kernels read 2^-8
of each weight, so their scales are 2^8 of what they were.

The packers return {"weight": ..., "scale": ...}, contiguous: what library.linear_step takes. The layouts are the same
on every CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trtllm_cli.kernels import quantization
from trtllm_cli.kernels.cpu.library import TILE
from trtllm_cli.kernels.linear_format import LinearFormat
from trtllm_cli.tensor_file import TensorInfo

_NIBBLES = 8  # inputs in a 32-bit word of int4
_FP8_FACTOR = 256.0


def step_arguments(fmt: LinearFormat) -> dict[str, Any]:
    """What `library.linear_step` must be told of a weight in this format."""
    name = "bfloat16" if fmt.name == "fp4" else fmt.name
    args = {"fmt": name, "group_size": _group_size(fmt), "minima": _has_minima(fmt)}
    return {key: value for key, value in args.items() if value}


def packed_infos(fmt: LinearFormat, out_features: int, in_features: int) -> dict[str, TensorInfo]:
    """The dtypes and shapes of what `pack` makes, before it is made."""
    tiles = -(-out_features // TILE)
    scale = {"scale": TensorInfo("float32", (tiles, TILE))}
    if group_size := _group_size(fmt):
        groups, sixteen = -(-in_features // group_size), TILE * _scale_dtype(fmt).itemsize
        weights = -(-group_size // _NIBBLES) * TILE * 4 if fmt.name == "int4" else group_size * TILE
        size = groups * (sixteen + weights + (sixteen if _has_minima(fmt) else 0))
        return {"weight": TensorInfo("uint8", (tiles, size)), **({} if fmt.name == "fp8" else scale)}
    match fmt.name:
        case "float32":
            return {"weight": TensorInfo("float32", (tiles, in_features, TILE))}
        case "bfloat16" | "fp4":
            weight = {"weight": TensorInfo("bfloat16", (tiles, -(-in_features // 2), TILE, 2))}
            return weight | (scale if fmt.name == "fp4" else {})
        case "int8" | "fp8":
            return {
                "weight": TensorInfo("int8" if fmt.name == "int8" else "uint8", (tiles, in_features, TILE)),
                **scale,
            }
    raise AssertionError(fmt)


def pack_linear(weight: torch.Tensor, fmt: LinearFormat) -> dict[str, torch.Tensor]:
    """weight [out, in] of any float dtype, quantized where `fmt` says so, and packed."""
    return pack(fmt, fmt.quantize(weight), weight.shape[1])


def pack(fmt: LinearFormat, parts: Mapping[str, torch.Tensor], in_features: int) -> dict[str, torch.Tensor]:
    """A weight that is in its format already: "weight", "scale", "zero" and "global_scale" of functional.linear."""
    weight = parts["weight"]
    if fmt.name == "float32":
        return {"weight": _tiles(weight.float())}
    if fmt.name == "bfloat16":
        return {"weight": _pack_bfloat16(weight)}
    if fmt.name == "fp4":
        values = quantization.dequantize(weight, "fp4", parts["scale"], group_size=fmt.group_size)
        return {"weight": _pack_bfloat16(values), "scale": _per_output(parts["global_scale"], len(weight))}
    scale = parts["scale"].float()
    values = weight.view(torch.uint8) if fmt.name == "fp8" else weight
    if fmt.name == "fp8":
        scale = scale * _FP8_FACTOR
    if fmt.group_size is None:
        return {"weight": _tiles(values), "scale": _per_output(scale, len(weight))}
    body = _words(values, fmt.group_size, in_features) if fmt.name == "int4" else _bytes(values, fmt.group_size)
    if fmt.name == "fp8":
        return {"weight": _join(body, scale)}
    zero = parts.get("zero")
    minimum = -scale * (zero.float() if zero is not None else 8.0) if _has_minima(fmt) else None
    multiplier = _multiplier(scale if minimum is None else torch.cat([scale, minimum], dim=1))
    scale = (scale / multiplier[:, None]).half()
    minimum = None if minimum is None else (minimum / multiplier[:, None]).half()
    return {"weight": _join(body, scale, minimum), "scale": _per_output(multiplier, len(weight))}


def unpack_linear(
    packed: Mapping[str, torch.Tensor], fmt: LinearFormat, out_features: int, in_features: int
) -> torch.Tensor:
    """The float32 [out, in] that the kernels multiply by: what undoes `pack`, but for quantization."""
    weight = packed["weight"]
    if _group_size(fmt):
        w = _unpack_groups(weight, fmt, in_features)
    elif fmt.name in ("bfloat16", "fp4"):
        w = weight.permute(0, 2, 1, 3).flatten(2).float()
    elif fmt.name == "fp8":
        w = weight.view(torch.float8_e4m3fn).transpose(1, 2).float() / _FP8_FACTOR
    else:
        w = weight.transpose(1, 2).float()
    if "scale" in packed:
        w = w * packed["scale"][..., None]
    return w.flatten(0, 1)[:out_features, :in_features].contiguous()


def _unpack_groups(weight: torch.Tensor, fmt: LinearFormat, in_features: int) -> torch.Tensor:
    """[tiles, 16, groups * group_size] float32, without the scale of outputs."""
    size, dtype = fmt.group_size, _scale_dtype(fmt)
    assert size is not None
    groups, sixteen = -(-in_features // size), TILE * dtype.itemsize
    minima_bytes = groups * sixteen if _has_minima(fmt) else 0
    body, minima = weight.split([weight.shape[1] - minima_bytes, minima_bytes], dim=1)
    body = body.unflatten(1, (groups, -1))
    scales, values = body.split([sixteen, body.shape[2] - sixteen], dim=2)
    scales = scales.contiguous().view(dtype).float()  # [tiles, groups, 16]
    if fmt.name == "int4":
        words = values.contiguous().view(torch.int32).unflatten(2, (-1, TILE))
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        q = ((words[..., None] >> shifts) & 15).permute(0, 1, 3, 2, 4).flatten(3)[..., :size].float()
    else:
        stored = torch.int8 if fmt.name == "int8" else torch.float8_e4m3fn
        q = values.contiguous().view(stored).unflatten(2, (size, TILE)).float().transpose(2, 3)
    w = q * scales[..., None]  # [tiles, groups, 16, group_size]
    if minima_bytes:
        w = w + minima.contiguous().view(dtype).float().unflatten(1, (groups, TILE))[..., None]
    if fmt.name == "fp8":
        w = w / _FP8_FACTOR
    return w.transpose(1, 2).flatten(2)


def _group_size(fmt: LinearFormat) -> int | None:
    """Inputs to a scale in the packed tile; fp4's scales are in its numbers."""
    return None if fmt.name == "fp4" else fmt.group_size


def _has_minima(fmt: LinearFormat) -> bool:
    return fmt.name == "int4" or (fmt.name == "int8" and fmt.has_zero)


def _scale_dtype(fmt: LinearFormat) -> torch.dtype:
    """Of a group's scale."""
    return torch.float32 if fmt.name == "fp8" else torch.float16


def _pack_bfloat16(weight: torch.Tensor) -> torch.Tensor:
    w = _pad(weight.to(torch.bfloat16), 1, 2)
    pairs = w.contiguous().view(torch.int32)  # [out, in / 2]: the even input in the low half
    return _tiles(pairs).view(torch.bfloat16).unflatten(2, (TILE, 2))


def _words(weight: torch.Tensor, group_size: int, in_features: int) -> torch.Tensor:
    """Nibbles uint8 [out, ceil(in / 2)] -> int32 [tiles, groups, ceil(group_size / 8), 16]."""
    nibbles = _pad(quantization.unpack_nibbles(weight, in_features), 1, group_size).unflatten(1, (-1, group_size))
    nibbles = _pad(nibbles, 2, _NIBBLES)
    packed = (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).contiguous().view(torch.int32)  # [out, groups, words]
    return _pad(packed, 0, TILE).unflatten(0, (-1, TILE)).permute(0, 2, 3, 1).contiguous()


def _bytes(values: torch.Tensor, group_size: int) -> torch.Tensor:
    """One-byte numbers [out, in] -> [tiles, groups, group_size, 16]."""
    groups = _pad(values, 1, group_size).unflatten(1, (-1, group_size))
    return _pad(groups, 0, TILE).unflatten(0, (-1, TILE)).permute(0, 2, 3, 1).contiguous()


def _join(body: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 [tiles, bytes] of weights [tiles, groups, ..., 16], scales and perhaps minima [out, groups]."""
    scales = _tiles(scale).view(torch.uint8)  # [tiles, groups, bytes]
    joined = torch.cat([scales, body.view(torch.uint8).flatten(2)], dim=2).flatten(1)
    if minimum is None:
        return joined
    return torch.cat([joined, _tiles(minimum).view(torch.uint8).flatten(1)], dim=1)


def _multiplier(values: torch.Tensor) -> torch.Tensor:
    """float32 [out]: the power of two by which the scales and minima [out, n] of each output are divided to be float16.

    1 where float16 has them (minima are products of float32 numbers, and may be off by the last bits); else what brings
    the largest to [2^14, 2^15).
    """
    kept = ((values.half().float() - values).abs() <= 2.0**-20 * values.abs()).all(dim=1)
    largest = values.abs().amax(dim=1).clamp_min(1e-30)
    return torch.where(kept, 1.0, torch.exp2(torch.floor(torch.log2(largest)) - 14))


def _tiles(weight: torch.Tensor) -> torch.Tensor:
    """[out, in] -> [tiles, in, 16]."""
    return _pad(weight, 0, TILE).unflatten(0, (-1, TILE)).transpose(1, 2).contiguous()


def _per_output(values: torch.Tensor, out_features: int) -> torch.Tensor:
    """[1] or [out] -> float32 [tiles, 16]."""
    return _pad(values.float().expand(out_features), 0, TILE).reshape(-1, TILE).contiguous()


def _pad(values: torch.Tensor, dim: int, multiple: int) -> torch.Tensor:
    """Zeros at the end of `dim`, up to a multiple."""
    missing = -values.shape[dim] % multiple
    if not missing:
        return values
    shape = list(values.shape)
    shape[dim] = missing
    return torch.cat([values, values.new_zeros(shape)], dim=dim)
