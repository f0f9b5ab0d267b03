"""Snapshots in the compressed-tensors format, as llm-compressor writes them.

Fields and layouts: https://github.com/vllm-project/compressed-tensors (`quantization/quant_args.py`,
`compressors/quantized_compressors`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.convert.prequantized.float8 import describe_float8, fixed_float8, unpack_float8
from trtllm_cli.convert.prequantized.scheme import Described, Parts, Read
from trtllm_cli.convert.prequantized.unpack import unpack_columns, unpack_rows
from trtllm_cli.errors import SnapshotError, UnsupportedError
from trtllm_cli.kernels.quantization import pack_nibbles
from trtllm_cli.quant_config import KvCacheQuantAlgo, LayerQuant, QuantAlgo
from trtllm_cli.tensor_file import TensorInfo

_WITHOUT_EFFECT = {
    "quant_method", "version", "global_compression_ratio", "quantization_status", "transform_config", "format",
}  # fmt: skip
_OF_ARGS = {"observer", "observer_kwargs", "block_structure", "scale_dtype", "zp_dtype"}
_FORMATS = (
    "float-quantized", "int-quantized", "pack-quantized", "naive-quantized", "dense", "mixed-precision",
)  # fmt: skip


@dataclass(frozen=True)
class _Args:
    """How weights or activations are quantized."""

    bits: int
    kind: str  # "int" or "float"
    strategy: str
    group_size: int
    symmetric: bool
    dynamic: bool


@dataclass(frozen=True)
class _Group:
    targets: tuple[str, ...]
    weights: _Args
    activations: _Args | None


class CompressedTensors:
    """Linears by their group's settings: FP8 and INT8 weights as they are, INT4 and INT8 packed into words."""

    def __init__(self, config: Fields) -> None:
        name = config.text("format", "dense")
        if name not in _FORMATS:
            raise config.unsupported("format", f"supported: {', '.join(_FORMATS)}")
        if config.raw("sparsity_config"):
            raise config.unsupported("sparsity_config", "sparse weights are not supported")
        if config.raw("transform_config"):
            raise config.unsupported("transform_config", "rotations of weights are not supported")
        self.ignore = tuple(config.texts("ignore", []))
        groups = config.table("config_groups")
        if groups is None or not groups.data:
            raise config.wrong("config_groups", "an object of groups")
        self.groups = [self._group(groups, key) for key in groups.data]
        self.kv_cache = self._kv_cache(config)
        config.refuse_unread(_WITHOUT_EFFECT, {})

    def describe(self, module: str, tensors: Mapping[str, TensorInfo], read: Read) -> Described | None:
        """See Scheme."""
        packed = tensors.get(f"{module}.weight_packed")
        weight = packed or tensors.get(f"{module}.weight")
        if weight is None or (packed is None and weight.dtype not in ("int8", "float8_e4m3fn")):
            return None
        group = self._of(module)
        if packed is not None:
            return self._describe_packed(module, tensors, packed, group, read)
        if weight.dtype == "float8_e4m3fn":
            static = group.activations is not None and not group.activations.dynamic
            found = describe_float8(module, tensors, static=static, blocks=group.weights.strategy == "block")
            if group.activations is None and found is not None:
                return Described(found.shape, None, found.tensors, "FP8 weights with plain activations")
            return found
        return self._describe_int8(module, tensors, weight, group)

    def fixed(self, module: str, described: Described, read: Read) -> Parts:
        """See Scheme."""
        if described.layer is not None and described.layer.quant_algo == "W8A8_SQ_PER_CHANNEL":
            return {"activation_scaling_factor": read(described.tensors[2]).float().reshape(1)}
        return fixed_float8(described, read)

    def unpack(self, module: str, described: Described, read: Read) -> Parts:
        """See Scheme."""
        first = described.tensors[0]
        if first.endswith("weight_packed"):
            return self._unpack_packed(module, described, read)
        weight = read(first)
        if weight.dtype == torch.float8_e4m3fn:
            return unpack_float8(described, read)
        return self._unpack_int8(described, weight, read)

    def _group(self, groups: Fields, key: str) -> _Group:
        group = groups.table(key)
        if group is None:
            raise groups.wrong(key, "an object")
        weights, activations = self._args(group, "weights"), self._args(group, "input_activations")
        if weights is None:
            raise group.wrong("weights", "an object")
        if group.raw("output_activations"):
            raise group.unsupported("output_activations", "quantized outputs are not supported")
        if (weights.kind, weights.bits) not in (("int", 4), ("int", 8), ("float", 8)):
            raise group.unsupported("weights", "integers of 4 or 8 bits and floats of 8 are supported")
        if activations and (activations.kind, activations.bits) not in (("int", 8), ("float", 8)):
            raise group.unsupported("input_activations", "8 bits are supported")
        targets = tuple(group.texts("targets", ["Linear"]))
        group.refuse_unread({"format"}, {})
        return _Group(targets, weights, activations)

    def _args(self, group: Fields, name: str) -> _Args | None:
        args = group.table(name)
        if args is None:
            return None
        size = args.raw("group_size")
        dynamic = args.raw("dynamic")
        if dynamic not in (None, True, False):
            raise args.unsupported("dynamic", "true and false are supported")
        made = _Args(
            bits=args.integer("num_bits", 8), kind=args.text("type", "int"), strategy=args.text("strategy", "tensor"),
            group_size=0 if size in (None, -1) else args.integer("group_size"),
            symmetric=args.flag("symmetric", True), dynamic=bool(dynamic),
        )  # fmt: skip
        if made.strategy not in ("tensor", "channel", "group", "token", "block"):
            raise args.unsupported("strategy", "tensor, channel, group, block and token are supported")
        if name == "input_activations" and not made.symmetric:
            raise args.unsupported("symmetric", "activations with zero points are not supported")
        args.raw("actorder")
        args.refuse_unread(_OF_ARGS, {})
        return made

    def _kv_cache(self, config: Fields) -> KvCacheQuantAlgo | None:
        args = self._args(config, "kv_cache_scheme")
        if args is None:
            return None
        if args.dynamic or args.strategy != "tensor" or args.bits != 8 or not args.symmetric:
            raise config.unsupported("kv_cache_scheme", "8 bits with one static scale are supported")
        return "FP8" if args.kind == "float" else "INT8"

    def _of(self, module: str) -> _Group:
        for group in self.groups:
            if any(_matches(module, target) for target in group.targets):
                return group
        raise SnapshotError(f"`{module}` is quantized, but no group of quantization_config has it")

    def _describe_packed(
        self, module: str, tensors: Mapping[str, TensorInfo], packed: TensorInfo, group: _Group, read: Read
    ) -> Described:
        parts = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
        names = tuple(n for part in parts if (n := f"{module}.{part}") in tensors)
        if names[1:3] != (f"{module}.weight_scale", f"{module}.weight_shape"):
            raise SnapshotError(f"tensor `{module}.weight_packed` has no weight_scale and weight_shape")
        numbers = read(f"{module}.weight_shape").tolist()
        args = group.weights
        if len(packed.shape) != 2 or len(numbers) != 2 or numbers[0] != packed.shape[0]:
            raise SnapshotError(f"tensor `{module}.weight_shape` is {numbers}, the weight {list(packed.shape)} words")
        rows, columns = int(numbers[0]), int(numbers[1])
        if packed.shape[1] != -(-columns * args.bits // 32):
            raise SnapshotError(f"tensor `{module}.weight_packed` has {packed.shape[1]} words for {columns} inputs")
        size = args.group_size or columns
        why = ""
        if columns % size:
            why = f"groups of {size} do not divide its {columns} inputs"
        elif f"{module}.weight_g_idx" in names:
            order = read(f"{module}.weight_g_idx").long()
            if int(order.min()) >= 0 and bool((order != torch.arange(columns) // size).any()):
                why = "its inputs are not in the order of their groups"
        elif group.activations is not None:
            why = "packed weights with quantized activations"
        if args.bits == 8 and not args.symmetric:
            why = "8-bit weights with zero points"
        if why:
            return Described((rows, columns), None, names, why)
        algo: QuantAlgo = "W4A16_GPTQ" if args.bits == 4 else "W8A16_GPTQ"
        layer = LayerQuant(quant_algo=algo, group_size=size, has_zero_point=not args.symmetric)
        return Described((rows, columns), layer, names)

    def _unpack_packed(self, module: str, described: Described, read: Read) -> Parts:
        rows, columns = described.shape
        args = self._of(module).weights
        values = unpack_columns(read(f"{module}.weight_packed"), args.bits)[:, :columns]  # plus the middle
        scales = read(f"{module}.weight_scale").float().reshape(rows, -1)
        zeros = None
        if f"{module}.weight_zero_point" in described.tensors:
            zeros = unpack_rows(read(f"{module}.weight_zero_point"), args.bits)[:rows].float().contiguous()
        middle = float(1 << (args.bits - 1))
        if described.layer is None:
            size = args.group_size or columns
            groups = torch.arange(columns) // size
            if f"{module}.weight_g_idx" in described.tensors:
                order = read(f"{module}.weight_g_idx").long()
                groups = order if int(order.min()) >= 0 else groups
            offset = middle if zeros is None else zeros[:, groups]
            return {"weight": (values.float() - offset) * scales[:, groups]}
        parts = {"weights_scaling_factor": scales.contiguous()}
        if args.bits == 8:
            parts["weight"] = (values.int() - int(middle)).to(torch.int8)
        else:
            parts["weight"] = pack_nibbles(values)
        if described.layer.has_zero_point:
            if zeros is None:
                raise SnapshotError(f"tensor `{module}.weight_zero_point` is missing")
            parts["zero"] = zeros
        return parts

    def _describe_int8(
        self, module: str, tensors: Mapping[str, TensorInfo], weight: TensorInfo, group: _Group
    ) -> Described:
        names = tuple(n for p in ("weight", "weight_scale", "input_scale") if (n := f"{module}.{p}") in tensors)
        if f"{module}.weight_scale" not in tensors or len(weight.shape) != 2:
            raise SnapshotError(f"tensor `{module}.weight` is int8, but has no weight_scale, or is no matrix")
        shape = (weight.shape[0], weight.shape[1])
        if not group.weights.symmetric:
            raise UnsupportedError(
                f"`{module}` has int8 weights with zero points, which are not supported",
                fix="convert the unquantized model; --qformat quantizes it",
            )
        if group.activations is None:
            if group.weights.strategy == "group":
                return Described(shape, LayerQuant(quant_algo="W8A16_GPTQ", group_size=group.weights.group_size), names)
            return Described(shape, LayerQuant(quant_algo="W8A16"), names)
        algo: QuantAlgo = "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN" if group.activations.dynamic else "W8A8_SQ_PER_CHANNEL"
        if algo == "W8A8_SQ_PER_CHANNEL" and f"{module}.input_scale" not in tensors:
            raise SnapshotError(f"tensor `{module}.input_scale` is missing, although activations have static scales")
        return Described(shape, LayerQuant(quant_algo=algo), names)

    def _unpack_int8(self, described: Described, weight: torch.Tensor, read: Read) -> Parts:
        rows = described.shape[0]
        scale = read(described.tensors[1]).float()
        assert described.layer is not None
        if described.layer.quant_algo == "W8A16_GPTQ":
            return {"weight": weight, "weights_scaling_factor": scale.reshape(rows, -1)}
        per_row = scale.reshape(-1).expand(rows).contiguous()
        name = "per_channel_scale" if described.layer.quant_algo == "W8A16" else "weights_scaling_factor"
        return {"weight": weight, name: per_row}


def _matches(module: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target == "Linear" or module == target or module.endswith("." + target)
