"""What a quantized snapshot's format says: which tensors stand for a weight, and what they are in our layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from trtllm_cli.models.stored import FP4_GROUP, FP8_BLOCK
from trtllm_cli.quant_config import KvCacheQuantAlgo, LayerQuant
from trtllm_cli.tensor_file import TensorInfo

if TYPE_CHECKING:
    import torch


# A weight's parts that have a row for each output, by the last part of their names, as models/stored.py declares them.
# Of a weight that comes plain, only `weight`.
Parts = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class Described:
    """What is known of a quantized weight before it is read."""

    shape: tuple[int, ...]  # [out, in]
    layer: LayerQuant | None  # None: it will come dequantized; `why` says why
    tensors: tuple[str, ...]  # of the snapshot, that it is made of
    why: str = ""


class Read(Protocol):
    """Reads a tensor of the snapshot whole."""

    def __call__(self, name: str) -> torch.Tensor:
        """The tensor, as it is stored."""


class Scheme(Protocol):
    """One format of quantized snapshots. A module is a linear's name, without `.weight`."""

    kv_cache: KvCacheQuantAlgo | None

    def describe(self, module: str, tensors: Mapping[str, TensorInfo], read: Read) -> Described | None:
        """The module's weight, or None where its weight is plain. Only small tensors are read."""

    def fixed(self, module: str, described: Described, read: Read) -> Parts:
        """The parts without rows, such as `perm` and scales [1]. Only small tensors are read."""

    def unpack(self, module: str, described: Described, read: Read) -> Parts:
        """The parts with rows, whole."""


def part_infos(layer: LayerQuant, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
    """The dtypes and shapes of what `unpack` gives, before it does."""
    rows, columns = shape
    algo, groups = layer.quant_algo, -(-columns // layer.group_size)
    per_row, per_group = TensorInfo("float32", (rows,)), TensorInfo("float32", (rows, groups))
    match algo:
        case "W4A16" | "W4A16_GPTQ" | "W4A16_AWQ" | "W4A8_AWQ":
            infos = {"weight": TensorInfo("uint8", (rows, columns // 2)), "weights_scaling_factor": per_group}
            return infos | ({"zero": per_group} if layer.has_zero_point else {})
        case "W8A16" if not layer.per_group:
            return {"weight": TensorInfo("int8", shape), "per_channel_scale": per_row}
        case "W8A16" | "W8A16_GPTQ":
            return {"weight": TensorInfo("int8", shape), "weights_scaling_factor": per_group}
        case "FP8":
            return {"weight": TensorInfo("float8_e4m3fn", shape)}
        case "FP8_PER_CHANNEL_PER_TOKEN":
            return {"weight": TensorInfo("float8_e4m3fn", shape), "per_channel_scale": per_row}
        case "FP8_BLOCK_SCALES":
            blocks = TensorInfo("float32", (rows, -(-columns // FP8_BLOCK)))
            return {"weight": TensorInfo("float8_e4m3fn", shape), "weights_scaling_factor": blocks}
        case "NVFP4":
            scales = TensorInfo("float8_e4m3fn", (rows, columns // FP4_GROUP))
            return {"weight": TensorInfo("uint8", (rows, columns // 2)), "weights_scaling_factor": scales}
    return {"weight": TensorInfo("int8", shape), "weights_scaling_factor": per_row}  # SmoothQuant
