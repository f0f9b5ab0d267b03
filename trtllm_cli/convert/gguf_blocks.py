"""GGUF's blocks of 32 numbers with one scale, as our int4 and int8 groups: the same numbers, not rounded again.

Layouts: ggml's `ggml-common.h`. Q4_0 `d * (q - 8)`, Q4_1 `d * q + m`, Q8_0 `d * q`; d and m are float16, and a block's
nibbles are its first 16 numbers (low) and its last 16 (high).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGMLQuantizationType

from trtllm_cli.convert.prequantized.scheme import part_infos
from trtllm_cli.kernels.quantization import pack_nibbles
from trtllm_cli.quant_config import LayerQuant

if TYPE_CHECKING:
    from trtllm_cli.convert.gguf_reader import GgufReader

GROUP = 32
LAYERS: dict[int, LayerQuant] = {
    GGMLQuantizationType.Q4_0: LayerQuant(quant_algo="W4A16", group_size=GROUP),
    GGMLQuantizationType.Q4_1: LayerQuant(quant_algo="W4A16", group_size=GROUP, has_zero_point=True),
    GGMLQuantizationType.Q8_0: LayerQuant(quant_algo="W8A16", group_size=GROUP, per_group=True),
}


class BlockWeight:
    """A weight of a GGUF file in one of LAYERS."""

    why_plain = ""
    dtype = "float32"
    fixed: Mapping[str, torch.Tensor] = {}

    def __init__(self, reader: GgufReader, name: str, layer: LayerQuant) -> None:
        self._reader, self.name, self.shape = reader, name, reader.tensors[name].shape
        self.layer: LayerQuant | None = layer
        self.parts = part_infos(layer, self.shape)

    def plain_rows(self, start: int, stop: int) -> torch.Tensor:
        """See SourceWeight."""
        return self._reader.rows(self.name, start, stop)

    def part_rows(self, part: str, start: int, stop: int) -> torch.Tensor:
        """See SourceWeight."""
        return self._reader.part_rows(self.name, part, start, stop)


def unpack(raw: bytearray, rows: int, kind: GGMLQuantizationType) -> dict[str, torch.Tensor]:
    """The parts of `rows` rows of a tensor of one of LAYERS, as models/stored.py declares them."""
    sizes = {GGMLQuantizationType.Q4_0: 18, GGMLQuantizationType.Q4_1: 20, GGMLQuantizationType.Q8_0: 34}
    blocks = np.frombuffer(raw, np.uint8).reshape(rows, -1, sizes[kind])
    scale = _half(blocks, 0)
    if kind == GGMLQuantizationType.Q8_0:
        values = torch.from_numpy(np.ascontiguousarray(blocks[:, :, 2:]).view(np.int8)).flatten(1)
        return {"weight": values, "weights_scaling_factor": scale}
    packed = torch.from_numpy(np.ascontiguousarray(blocks[:, :, sizes[kind] - 16 :]))
    nibbles = torch.cat([packed & 15, packed >> 4], dim=2)  # [rows, groups, 32]
    if kind == GGMLQuantizationType.Q4_0:
        return {"weight": pack_nibbles(nibbles.flatten(1)), "weights_scaling_factor": scale}
    minimum = _half(blocks, 2)
    # Without a scale every number is m: level 1 of a scale as large as m, from zero 0 or 2.
    flat = scale == 0
    nibbles = torch.where(flat[..., None], 1, nibbles).to(torch.uint8)
    zero = torch.where(flat, 1 - minimum.sign(), -minimum / scale)
    scale = torch.where(flat, minimum.abs(), scale)
    return {"weight": pack_nibbles(nibbles.flatten(1)), "weights_scaling_factor": scale, "zero": zero}


def _half(blocks: np.ndarray[Any, Any], at: int) -> torch.Tensor:
    """float32 [rows, groups] of the float16 at a byte of each block."""
    halves = np.ascontiguousarray(blocks[:, :, at : at + 2]).view(np.float16)[..., 0]
    return torch.from_numpy(halves.astype(np.float32))
