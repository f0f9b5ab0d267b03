"""FP8 snapshots without a tool's own format: DeepSeek's blocks, vLLM's one scale a tensor, FBGEMM's rows."""

from __future__ import annotations

from collections.abc import Mapping

from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.convert.prequantized.scheme import Described, Parts, Read
from trtllm_cli.convert.prequantized.unpack import expand_blocks
from trtllm_cli.errors import SnapshotError
from trtllm_cli.kernels.quantization import dequantize
from trtllm_cli.models.stored import FP8_BLOCK
from trtllm_cli.quant_config import KvCacheQuantAlgo, LayerQuant, QuantAlgo
from trtllm_cli.tensor_file import TensorInfo

_WITHOUT_EFFECT = {
    "quant_method", "fmt", "modules_to_not_convert", "ignored_layers", "kv_cache_scheme", "scale_fmt",
    "activation_scale_ub", "modules_to_not_convert_regex",
}  # fmt: skip
_SCALES = ("weight_scale_inv", "weight_scale")
FP8_DTYPE = "float8_e4m3fn"


class Float8:
    """`weight` F8_E4M3 [out, in], and what it is multiplied by: `weight_scale_inv` [out / 128, in / 128] (despite its
    name), or `weight_scale`, one number or [out, 1]. With `input_scale` all activations share a scale.
    """

    kv_cache: KvCacheQuantAlgo | None = None

    def __init__(self, config: Fields) -> None:
        block = config.raw("weight_block_size")
        if block not in (None, [FP8_BLOCK, FP8_BLOCK]):
            raise config.unsupported("weight_block_size", f"blocks of [{FP8_BLOCK}, {FP8_BLOCK}] are supported")
        scheme = config.text("activation_scheme", "dynamic")
        if scheme not in ("dynamic", "static"):
            raise config.unsupported("activation_scheme", "dynamic and static are supported")
        self.blocks, self.static = block is not None, scheme == "static"
        config.refuse_unread(_WITHOUT_EFFECT, {})

    def describe(self, module: str, tensors: Mapping[str, TensorInfo], read: Read) -> Described | None:
        """See Scheme."""
        return describe_float8(module, tensors, static=self.static, blocks=self.blocks)

    def fixed(self, module: str, described: Described, read: Read) -> Parts:
        """See Scheme."""
        return fixed_float8(described, read)

    def unpack(self, module: str, described: Described, read: Read) -> Parts:
        """See Scheme."""
        return unpack_float8(described, read)


def describe_float8(module: str, tensors: Mapping[str, TensorInfo], *, static: bool, blocks: bool) -> Described | None:
    """An FP8 weight with its scale, by their shapes; None where the module's weight is plain."""
    weight = tensors.get(f"{module}.weight")
    if weight is None or weight.dtype != FP8_DTYPE:
        return None
    scale = next((n for p in _SCALES if (n := f"{module}.{p}") in tensors), None)
    if scale is None or len(weight.shape) != 2:
        raise SnapshotError(f"tensor `{module}.weight` is {weight.dtype}, but has no scale, or is no matrix")
    names, (rows, columns) = [f"{module}.weight", scale], weight.shape
    count = tensors[scale].shape
    if static:
        if f"{module}.input_scale" not in tensors:
            raise SnapshotError(f"tensor `{module}.input_scale` is missing, although activations have static scales")
        names.append(f"{module}.input_scale")
    algo: QuantAlgo
    why = ""
    if blocks:
        squeezed = tuple(n for n in count if n != 1) if len(count) == 4 else count
        if squeezed != tuple(-(-n // FP8_BLOCK) for n in (rows, columns)) and len(count) != 4:
            raise SnapshotError(f"tensor `{scale}` is {list(count)}, which are not blocks of {rows} x {columns}")
        algo = "FP8_BLOCK_SCALES"
    elif count in ((), (1,), (1, 1)):
        algo = "FP8" if static else "FP8_PER_CHANNEL_PER_TOKEN"
    elif count in ((rows,), (rows, 1)):
        algo = "FP8_PER_CHANNEL_PER_TOKEN"
        if static:
            why = "a scale for each output and one for all activations"
    else:
        raise SnapshotError(f"tensor `{scale}` is {list(count)}: neither one number nor one for each output")
    return Described((rows, columns), None if why else LayerQuant(quant_algo=algo), tuple(names), why)


def fixed_float8(described: Described, read: Read) -> Parts:
    """The scales of the weight and of activations, where both are one number."""
    if described.layer is None or described.layer.quant_algo != "FP8":
        return {}
    names = ("weights_scaling_factor", "activation_scaling_factor")
    return {ours: read(name).float().reshape(1) for ours, name in zip(names, described.tensors[1:], strict=True)}


def unpack_float8(described: Described, read: Read) -> Parts:
    """The weight that describe_float8 found."""
    weight, (rows, columns) = read(described.tensors[0]), described.shape
    algo = described.layer.quant_algo if described.layer else None
    if algo == "FP8":
        return {"weight": weight}
    scale = read(described.tensors[1]).float()
    if algo == "FP8_BLOCK_SCALES":
        blocks = scale.reshape(-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
        return {"weight": weight, "weights_scaling_factor": expand_blocks(blocks, rows, FP8_BLOCK)}
    per_row = scale.reshape(-1).expand(rows).contiguous()
    if algo is None:
        return {"weight": dequantize(weight, "fp8", per_row)}
    return {"weight": weight, "per_channel_scale": per_row}
