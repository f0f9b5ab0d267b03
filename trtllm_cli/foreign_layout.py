"""Checkpoints that ModelOpt's `export_tensorrt_llm_checkpoint` writes, seen in our layout.

They have the same names for most things. What differs (nvidia-modelopt 0.47, `torch/export`):

    INT4 weights            int8 [out / 2, in], two outputs to a byte, two's complement; ours two inputs, plus 8
    W8A16's scales          `weights_scaling_factor`; ours `per_channel_scale`
    W4A8_AWQ                also `weights_scaling_factor_2`, which rounds weights to FP8 for tensor cores; not needed
    FP8 blocks              [out / 128, 1, in / 128, 1]; ours a row for each output
    scalars, pre-scales     of no dimension, in the model's dtype; ours [1], in float32
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trtllm_cli.errors import ArtifactError
from trtllm_cli.quant_config import QuantConfig
from trtllm_cli.tensor_file import TensorFile, TensorInfo

_BLOCK = 128
_VECTORS = ("prequant_scaling_factor", "activation_scaling_factor", "weights_scaling_factor_2")


class ForeignTensors(TensorFile):
    """A rank file in ModelOpt's layout: `tensors` and `read` are as ours would be."""

    def __init__(self, path: Path, error: type[ArtifactError], quantization: QuantConfig) -> None:
        super().__init__(path, error)
        self._stored = dict(self.tensors)
        self._views: dict[str, tuple[str, Callable[[str], np.ndarray[Any, Any]]]] = {}
        for name in list(self.tensors):
            self._adapt(name, quantization)

    def read(self, name: str) -> bytearray:
        """The tensor's bytes in our layout."""
        if name not in self._views:
            return super().read(name)
        stored, view = self._views[name]
        return bytearray(np.ascontiguousarray(view(stored)).tobytes())

    def _adapt(self, name: str, quantization: QuantConfig) -> None:
        module, _, part = name.rpartition(".")
        info, scale = self._stored[name], self._stored.get(f"{module}.weights_scaling_factor")
        layer = quantization.layer_quant(module)
        algo = layer.quant_algo if layer else None
        if part == "weight" and info.dtype == "int8" and algo in ("W4A16_AWQ", "W4A8_AWQ") and scale is not None:
            shape = (*info.shape[:-2], 2 * info.shape[-2], info.shape[-1] // 2)
            self._replace(name, name, TensorInfo("uint8", shape), self._int4)
        elif part == "weights_scaling_factor" and algo == "W8A16" and len(info.shape) == 1:
            self._replace(name, f"{module}.per_channel_scale", info, self._raw)
        elif part == "weights_scaling_factor" and algo == "FP8_BLOCK_SCALES" and len(info.shape) == 4:
            weight = self._stored[f"{module}.weight"]
            self._replace(name, name, TensorInfo("float32", (weight.shape[0], info.shape[2])), self._blocks)
        elif part == "weights_scaling_factor_2" and algo == "W4A8_AWQ":
            del self.tensors[name]
        elif part in (*_VECTORS, "weights_scaling_factor") and not info.shape:
            self._replace(name, name, TensorInfo("float32", (1,)), self._floats)
        elif part == "prequant_scaling_factor" and info.dtype != "float32":
            self._replace(name, name, TensorInfo("float32", info.shape), self._floats)

    def _replace(self, stored: str, name: str, info: TensorInfo, view: Callable[[str], np.ndarray[Any, Any]]) -> None:
        del self.tensors[stored]
        self.tensors[name] = info
        self._views[name] = (stored, view)

    def _bytes(self, stored: str) -> bytearray:
        ours = self.tensors
        self.tensors = self._stored  # what super().read looks a tensor's size up in
        try:
            return super().read(stored)
        finally:
            self.tensors = ours

    def _raw(self, stored: str) -> np.ndarray[Any, Any]:
        return np.frombuffer(self._bytes(stored), np.uint8)

    def _floats(self, stored: str) -> np.ndarray[Any, Any]:
        """float32 of any float dtype."""
        data = self._bytes(stored)
        match self._stored[stored].dtype:
            case "bfloat16":
                return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
            case "float16":
                return np.frombuffer(data, np.float16).astype(np.float32)
        return np.frombuffer(data, np.float32)

    def _int4(self, stored: str) -> np.ndarray[Any, Any]:
        """uint8 [..., out, in / 2] of [..., out / 2, in]."""
        shape = self._stored[stored].shape
        packed = np.frombuffer(self._bytes(stored), np.uint8).reshape(math.prod(shape[:-1]), 1, shape[-1])
        nibbles = np.concatenate([packed & 15, packed >> 4], axis=1) ^ 8  # [out / 2, 2, in]
        return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)

    def _blocks(self, stored: str) -> np.ndarray[Any, Any]:
        """float32 [out, in / 128]."""
        rows, _, groups, _ = self._stored[stored].shape
        scale = self._floats(stored).reshape(rows, groups)
        weight = stored.removesuffix("weights_scaling_factor") + "weight"
        return np.repeat(scale, _BLOCK, axis=0)[: self._stored[weight].shape[0]]


def has_pre_quant_scales(path: Path, error: type[ArtifactError]) -> bool:
    """Whether a rank file scales activations: ModelOpt's config does not say so of SmoothQuant."""
    with TensorFile(path, error) as file:
        return any(name.endswith(".prequant_scaling_factor") for name in file.tensors)
