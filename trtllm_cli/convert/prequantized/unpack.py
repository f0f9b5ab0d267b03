"""Integers packed into 32-bit words, as GPTQ, AWQ and compressed-tensors store them, and nibbles as ModelOpt does.

Formats: AutoGPTQ's and AutoAWQ's `qlinear` modules, compressed-tensors' `pack_to_int32`, ModelOpt's
`pack_int4_in_uint8`.
"""

from __future__ import annotations

import torch

# AutoAWQ (its GEMM kernels' order): the column of each nibble of a word, from the lowest up.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack_columns(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [n, m] -> uint8 [n, m * 32 / bits], bits 4 or 8: a word's lowest bits are its first column."""
    octets = words.contiguous().view(torch.uint8)  # little-endian
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)


def unpack_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [n, m] -> uint8 [n * 32 / bits, m]: a word's lowest bits are its first row."""
    return unpack_columns(words.T.contiguous(), bits).T


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """int32 [n, m] -> uint8 [n, 8 m], nibbles in AutoAWQ's order."""
    nibbles = unpack_columns(words, 4).unflatten(1, (-1, 8))
    out = torch.empty_like(nibbles)
    out[:, :, list(AWQ_ORDER)] = nibbles
    return out.flatten(1)


def unpack_modelopt_int4(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., out / 2, in] of signed nibbles, the even output in the low one -> uint8 [..., out, in], plus 8."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-2).flatten(-3, -2)
    return nibbles ^ 8  # two's complement to offset binary


def expand_blocks(scale: torch.Tensor, rows: int, block: int) -> torch.Tensor:
    """[ceil(rows / block), groups] -> [rows, groups]: each output gets its block's scales."""
    return scale.repeat_interleave(block, dim=0)[:rows].contiguous()
