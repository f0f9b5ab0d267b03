"""Lays a linear layer's weight out for the cpu kernels: at build time, one weight at a time.

Outputs go in tiles of 16 side by side (the last one padded with zeros), inputs one after another, so that a kernel
streams a tile from its first byte to its last and multiplies 16 outputs by one broadcast input:

    float32   weight [tiles, in, 16] float32
    bfloat16  weight [tiles, ceil(in / 2), 16, 2] bfloat16, two inputs to a 32-bit lane
    int8      weight [tiles, in, 16] int8; scale [tiles, 16] float32
    int4      weight [tiles, bytes] uint8; scale [tiles, 16] float32, a power of two

A tile of int4 is, for each group of inputs, [16] scales in float16 and then [ceil(group_size / 8), 16] 32-bit words,
each with 8 inputs of one output from its lowest nibble up; and after all groups, [groups, 16] minima in float16. A
weight is `(nibble * scale16 + minimum16) * scale`, with a `scale` that keeps the halves well inside float16's range.

Each packer returns {"weight": ..., "scale": ...} (scale for int8 and int4 only), contiguous: what library.linear_step
takes. The layouts are the same on every CPU.
"""

from __future__ import annotations

import torch

from trtllm_cli.kernels import quantization
from trtllm_cli.kernels.cpu.library import TILE, WeightFormat
from trtllm_cli.tensor_file import TensorInfo

_NIBBLES = 8  # inputs in a 32-bit word of int4


def pack_linear(weight: torch.Tensor, fmt: WeightFormat, group_size: int | None = None) -> dict[str, torch.Tensor]:
    """weight [out, in] of any float dtype, quantized where `fmt` says so, and packed.

    `group_size` is for int4: inputs that share a scale and a minimum, by default 32; the last group may be short.
    """
    match fmt:
        case "float32":
            return {"weight": _tiles(weight.float())}
        case "bfloat16":
            return {"weight": _pack_bfloat16(weight)}
        case "int8":
            return pack_int8(*quantization.quantize_int8(weight))
        case "int4":
            group_size = group_size or quantization.DEFAULT_GROUP_SIZE
            values, scale, zero = quantization.quantize_int4(weight, group_size)
            return pack_int4(values, scale, zero, group_size, weight.shape[1])


def packed_infos(fmt: str, out_features: int, in_features: int, group_size: int | None) -> dict[str, TensorInfo]:
    """The dtypes and shapes of what the packers make, before it is made."""
    tiles = -(-out_features // TILE)
    scale = TensorInfo("float32", (tiles, TILE))
    match fmt:
        case "float32":
            return {"weight": TensorInfo("float32", (tiles, in_features, TILE))}
        case "bfloat16":
            return {"weight": TensorInfo("bfloat16", (tiles, -(-in_features // 2), TILE, 2))}
        case "int8":
            return {"weight": TensorInfo("int8", (tiles, in_features, TILE)), "scale": scale}
        case "int4":
            assert group_size is not None
            groups, words = -(-in_features // group_size), -(-group_size // _NIBBLES)
            return {"weight": TensorInfo("uint8", (tiles, groups * (words + 1) * TILE * 4)), "scale": scale}
    raise AssertionError(fmt)


def pack_int8(weight: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """int8 [out, in] and scale [out], as quantization.quantize_int8 or a checkpoint gives them."""
    return {"weight": _tiles(weight), "scale": _outputs(scale.float())}


def pack_int4(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, group_size: int, in_features: int
) -> dict[str, torch.Tensor]:
    """uint4 [out, ceil(in / 2)] and scale, zero [out, ceil(in / group_size)]; zero 8 where there is none."""
    nibbles = quantization.unpack_nibbles(weight, in_features)
    words = _words(nibbles, group_size)  # [tiles, groups, words, 16] int32
    s = scale.float()
    minimum = -s * (8.0 if zero is None else zero.float())
    multiplier = _multiplier(s, minimum)  # [out]
    scales, minima = (_tiles(v / multiplier[:, None]).half().view(torch.uint8) for v in (s, minimum))
    groups = torch.cat([scales, words.view(torch.uint8).flatten(2)], dim=2)
    return {
        "weight": torch.cat([groups.flatten(1), minima.flatten(1)], dim=1),
        "scale": _outputs(multiplier),
    }


def unpack_linear(
    packed: dict[str, torch.Tensor], fmt: WeightFormat, out_features: int, in_features: int,
    group_size: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """The float32 [out, in] that the kernels multiply by: what undoes pack_linear, up to quantization."""
    weight = packed["weight"]
    match fmt:
        case "float32":
            w = weight.transpose(1, 2)
        case "bfloat16":
            w = weight.permute(0, 2, 1, 3).flatten(2).float()
        case "int8":
            w = weight.transpose(1, 2).float() * packed["scale"][..., None]
        case "int4":
            w = _unpack_int4(packed, group_size or quantization.DEFAULT_GROUP_SIZE)
    return w.flatten(0, 1)[:out_features, :in_features].contiguous()


def _unpack_int4(packed: dict[str, torch.Tensor], group_size: int) -> torch.Tensor:
    """[tiles, 16, groups * group_size] float32."""
    num_words = -(-group_size // _NIBBLES)
    weight, half = packed["weight"], 2 * TILE  # bytes of 16 halves
    groups = weight.shape[1] // (half + num_words * TILE * 4 + half)
    body, minima = weight.split([weight.shape[1] - groups * half, groups * half], dim=1)
    scales, words = body.unflatten(1, (groups, -1)).split([half, num_words * TILE * 4], dim=2)
    words = words.contiguous().view(torch.int32).unflatten(2, (num_words, TILE))
    scales = scales.contiguous().view(torch.float16).float()  # [tiles, groups, 16]
    minima = minima.contiguous().view(torch.float16).float().unflatten(1, (groups, TILE))
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    q = ((words[..., None] >> shifts) & 15).permute(0, 1, 3, 2, 4).flatten(3)[..., :group_size].float()
    w = q * scales[..., None] + minima[..., None]  # [tiles, groups, 16, group_size]
    return w.transpose(1, 2).flatten(2) * packed["scale"][..., None]


def _pack_bfloat16(weight: torch.Tensor) -> torch.Tensor:
    w = weight.to(torch.bfloat16)
    if w.shape[1] % 2:
        w = torch.nn.functional.pad(w, (0, 1))
    pairs = w.contiguous().view(torch.int32)  # [out, in / 2]: the even input in the low half
    return _tiles(pairs).view(torch.bfloat16).unflatten(2, (TILE, 2))


def _words(nibbles: torch.Tensor, group_size: int) -> torch.Tensor:
    """uint8 [out, in] -> int32 [tiles, groups, ceil(group_size / 8), 16]."""
    nibbles = _pad(nibbles, 1, group_size).unflatten(1, (-1, group_size))
    nibbles = _pad(nibbles, 2, _NIBBLES)
    packed = (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).contiguous().view(torch.int32)  # [out, groups, words]
    return _pad(packed, 0, TILE).unflatten(0, (-1, TILE)).permute(0, 2, 3, 1).contiguous()


def _multiplier(scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    """float32 [out]: the power of two that brings the largest of each output's scales and minima to [2^11, 2^12)."""
    largest = torch.maximum(scale.abs(), minimum.abs()).amax(dim=1).clamp_min(1e-30)
    return torch.exp2(torch.floor(torch.log2(largest)) - 11)


def _tiles(weight: torch.Tensor) -> torch.Tensor:
    """[out, in] -> [tiles, in, 16]."""
    return _pad(weight, 0, TILE).unflatten(0, (-1, TILE)).transpose(1, 2).contiguous()


def _outputs(values: torch.Tensor) -> torch.Tensor:
    """[out] -> [tiles, 16]."""
    return _pad(values, 0, TILE).view(-1, TILE)


def _pad(values: torch.Tensor, dim: int, multiple: int) -> torch.Tensor:
    """Zeros at the end of `dim`, up to a multiple."""
    missing = -values.shape[dim] % multiple
    if not missing:
        return values
    shape = list(values.shape)
    shape[dim] = missing
    return torch.cat([values, values.new_zeros(shape)], dim=dim)
