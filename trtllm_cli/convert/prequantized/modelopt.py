"""NVIDIA ModelOpt's unified Hugging Face export: `hf_quant_config.json`, and each linear's scales beside its weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch

from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.convert.prequantized.float8 import describe_float8, fixed_float8, unpack_float8
from trtllm_cli.convert.prequantized.scheme import Described, Parts, Read
from trtllm_cli.convert.prequantized.unpack import unpack_modelopt_int4
from trtllm_cli.errors import SnapshotError
from trtllm_cli.kernels.quantization import pack_nibbles
from trtllm_cli.models.stored import FP4_GROUP
from trtllm_cli.quant_config import KvCacheQuantAlgo, LayerQuant
from trtllm_cli.tensor_file import TensorInfo

_WITHOUT_EFFECT = {"producer", "quant_method", "config_groups", "ignore", "exclude_modules", "version"}
_FP8 = {"FP8": (True, False), "FP8_PER_CHANNEL_PER_TOKEN": (False, False), "FP8_PB_WO": (False, True)}
_INT4 = ("W4A16_AWQ", "W4A8_AWQ")
_KNOWN = (*_FP8, *_INT4, "W8A8_SQ_PER_CHANNEL", "W8A16", "NVFP4", "MIXED_PRECISION")


class ModelOpt:
    """By `quant_algo`: `weight` with `weight_scale`, `weight_scale_2`, `input_scale` and `pre_quant_scale`.

    The norms before q, k, v, gate and up hold those layers' pre_quant_scale already.
    """

    def __init__(self, config: Fields) -> None:
        self.algo = self._algo(config, "quant_algo")
        kv = config.raw("kv_cache_quant_algo")
        if kv is not None and kv not in get_args(KvCacheQuantAlgo):
            raise config.unsupported("kv_cache_quant_algo", f"known: {', '.join(get_args(KvCacheQuantAlgo))}")
        self.kv_cache: KvCacheQuantAlgo | None = kv
        self.group_size = config.integer("group_size", 128)
        if config.flag("has_zero_point", False):
            raise config.unsupported("has_zero_point", "ModelOpt's INT4 weights have none")
        config.raw("pre_quant_scale")
        self.layers: dict[str, Fields] = {}
        if (layers := config.table("quantized_layers")) is not None:
            for name in layers.data:
                if (layer := layers.table(name)) is not None:
                    self.layers[name] = layer
        config.refuse_unread(_WITHOUT_EFFECT, {})

    def _algo(self, config: Fields, name: str) -> str:
        algo = str(config.text(name)).upper()
        if algo not in _KNOWN:
            raise config.unsupported(name, f"supported: {', '.join(_KNOWN)}")
        return algo

    def _of(self, module: str) -> tuple[str, int]:
        """The module's algorithm and group size."""
        if self.algo != "MIXED_PRECISION":
            return self.algo, self.group_size
        layer = self.layers.get(module)
        if layer is None:
            raise SnapshotError(f"`{module}` is quantized, but quantized_layers does not have it")
        return self._algo(layer, "quant_algo"), layer.integer("group_size", self.group_size)

    def describe(self, module: str, tensors: Mapping[str, TensorInfo], read: Read) -> Described | None:
        """See Scheme."""
        weight = tensors.get(f"{module}.weight")
        if weight is None or weight.dtype not in ("float8_e4m3fn", "uint8", "int8"):
            return None
        algo, group_size = self._of(module)
        if algo in _FP8:
            static, blocks = _FP8[algo]
            return describe_float8(module, tensors, static=static, blocks=blocks)
        parts = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")
        names = tuple(n for part in parts if (n := f"{module}.{part}") in tensors)
        if f"{module}.weight_scale" not in tensors or len(weight.shape) != 2:
            raise SnapshotError(f"tensor `{module}.weight` is {weight.dtype}, but has no weight_scale, or is no matrix")
        rows, columns = weight.shape
        scaled = f"{module}.pre_quant_scale" in tensors
        if algo in _INT4:
            layer = LayerQuant.model_validate({"quant_algo": algo, "group_size": group_size, "pre_quant_scale": scaled})
            return Described((2 * rows, columns), layer, names)
        if algo == "NVFP4":
            return Described((rows, 2 * columns), LayerQuant(quant_algo="NVFP4", group_size=FP4_GROUP), names)
        if algo == "W8A16":
            return Described((rows, columns), LayerQuant(quant_algo="W8A16"), names)
        layer = LayerQuant(quant_algo="W8A8_SQ_PER_CHANNEL", pre_quant_scale=scaled)
        return Described((rows, columns), layer, names)

    def fixed(self, module: str, described: Described, read: Read) -> Parts:
        """See Scheme. W4A8_AWQ's `weight_scale_2`, which rounds weights to fp8 for an fp8 product, is not needed."""
        assert described.layer is not None
        algo, parts = described.layer.quant_algo, {}
        if algo == "FP8":
            return fixed_float8(described, read)
        for theirs, ours in (
            ("weight_scale_2", "weights_scaling_factor_2"),
            ("input_scale", "activation_scaling_factor"),
            ("pre_quant_scale", "prequant_scaling_factor"),
        ):
            if f"{module}.{theirs}" in described.tensors and (theirs, algo) != ("weight_scale_2", "W4A8_AWQ"):
                parts[ours] = read(f"{module}.{theirs}").float().reshape(-1)
        return parts

    def unpack(self, module: str, described: Described, read: Read) -> Parts:
        """See Scheme."""
        assert described.layer is not None
        weight = read(f"{module}.weight")
        if weight.dtype == torch.float8_e4m3fn:
            return unpack_float8(described, read)
        scale = read(f"{module}.weight_scale")
        match described.layer.quant_algo:
            case "W4A16_AWQ" | "W4A8_AWQ":
                weight = pack_nibbles(unpack_modelopt_int4(weight))
            case "W8A16":
                return {"weight": weight, "per_channel_scale": scale.float().reshape(-1)}
            case "NVFP4":
                return {"weight": weight, "weights_scaling_factor": scale}
        return {"weight": weight, "weights_scaling_factor": scale.float()}
