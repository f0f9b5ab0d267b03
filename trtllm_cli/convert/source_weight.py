"""One weight of a source under the name that its family knows, however the source stores it: plain, or quantized.

Rows are outputs: those of a weight [out, in], of [experts, out, in] all experts' one after another, of a vector its
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from trtllm_cli.quant_config import LayerQuant
from trtllm_cli.tensor_file import TensorInfo

if TYPE_CHECKING:
    import torch

    from trtllm_cli.convert.reader import Reader


class SourceWeight(Protocol):
    """A weight that is read in blocks of rows.

    A quantized one has `parts`, a row of each for every output, and `fixed` parts without rows: by the last part of
    their names, dtypes and layout as models/stored.py declares them.
    """

    @property
    def name(self) -> str:
        """The family's name for it, `.weight` included."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight itself: [out, in], however its numbers are packed."""

    @property
    def dtype(self) -> str:
        """Of plain_rows."""

    @property
    def layer(self) -> LayerQuant | None:
        """How it is quantized; None for plain numbers, and where only plain_rows can be had of it."""

    @property
    def why_plain(self) -> str:
        """Why a weight that the source has quantized comes only as plain numbers; empty where none of it is so."""

    @property
    def parts(self) -> Mapping[str, TensorInfo]:
        """Parts with rows, `weight` and its scales, as whole tensors; only if `layer` is set."""

    @property
    def fixed(self) -> Mapping[str, torch.Tensor]:
        """Parts without rows, such as `perm` or scales [1]; only if `layer` is set."""

    def plain_rows(self, start: int, stop: int) -> torch.Tensor:
        """The numbers of rows start..stop, [n, in], or [n] of a vector, dequantized if need be."""

    def part_rows(self, part: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of one of `parts`, [n, ...], as it is stored."""


class PlainWeight:
    """A tensor of plain numbers."""

    layer: LayerQuant | None = None
    why_plain = ""
    parts: Mapping[str, TensorInfo] = {}
    fixed: Mapping[str, torch.Tensor] = {}

    def __init__(self, reader: Reader, name: str) -> None:
        info = reader.tensors[name]
        self._reader = reader
        self.name, self.shape, self.dtype = name, info.shape, info.dtype

    def plain_rows(self, start: int, stop: int) -> torch.Tensor:
        """See SourceWeight."""
        return self._reader.rows(self.name, start, stop)

    def part_rows(self, part: str, start: int, stop: int) -> torch.Tensor:
        """A plain weight has no parts."""
        raise AssertionError(f"{self.name} is not quantized: it has no {part}[{start}:{stop}]")


class RenamedWeight:
    """A weight under another name."""

    def __init__(self, weight: SourceWeight, name: str) -> None:
        self._weight, self.name = weight, name
        self.shape, self.dtype, self.layer = weight.shape, weight.dtype, weight.layer
        self.why_plain, self.parts = weight.why_plain, weight.parts
        self.plain_rows, self.part_rows = weight.plain_rows, weight.part_rows

    @property
    def fixed(self) -> Mapping[str, torch.Tensor]:
        """See SourceWeight."""
        return self._weight.fixed


def num_rows(shape: tuple[int, ...]) -> int:
    """Rows of a tensor: all of its dimensions but the last, of a vector its length, of a number 1."""
    return math.prod(shape[:-1]) if len(shape) > 1 else math.prod(shape)


def dequantize_rows(
    layer: LayerQuant, parts: Mapping[str, torch.Tensor], fixed: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """float32 [n, in] of the same rows of a quantized weight's parts: what the layer's inputs meet as they come."""
    import torch

    from trtllm_cli.kernels.quantization import dequantize
    from trtllm_cli.models.stored import FP4_GROUP, FP8_BLOCK

    weight, both = parts["weight"], {**fixed, **parts}
    scale = both["weights_scaling_factor"] if "weights_scaling_factor" in both else both["per_channel_scale"]
    formats = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
    quant = formats.get(weight.dtype, "fp4" if layer.quant_algo == "NVFP4" else "int4")
    sizes = {"FP8_BLOCK_SCALES": FP8_BLOCK, "NVFP4": FP4_GROUP}
    size = sizes.get(layer.quant_algo, layer.group_size) if scale.ndim > 1 else None
    plain = dequantize(weight, quant, scale, both.get("zero"), both.get("weights_scaling_factor_2"), size)
    if "perm" in both:  # the stored columns are the inputs in this order
        plain = plain[:, torch.argsort(both["perm"])]
    return plain * both["prequant_scaling_factor"] if "prequant_scaling_factor" in both else plain
