"""AWQ snapshots (arXiv 2306.00978), as AutoAWQ writes them for its GEMM kernels."""

from __future__ import annotations

from collections.abc import Mapping

from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.convert.prequantized.scheme import Described, Parts, Read
from trtllm_cli.convert.prequantized.unpack import unpack_awq
from trtllm_cli.errors import SnapshotError
from trtllm_cli.kernels.quantization import pack_nibbles
from trtllm_cli.quant_config import KvCacheQuantAlgo, LayerQuant
from trtllm_cli.tensor_file import TensorInfo

_WITHOUT_EFFECT = {"quant_method", "backend", "modules_to_not_convert", "do_fuse", "exllama_config", "modules_to_fuse"}
_NEUTRAL = {"fuse_max_seq_len": (None,), "version": ("gemm", "GEMM")}


class Awq:
    """`qweight` int32 [in, out / 8], `qzeros` int32 [groups, out / 8] and `scales` float16 [groups, out]; the scales of
    activations are in the weights before already.
    """

    kv_cache: KvCacheQuantAlgo | None = None

    def __init__(self, config: Fields) -> None:
        bits = "w_bit" if config.has("w_bit") else "bits"
        if config.integer(bits) != 4:
            raise config.unsupported(bits, "AWQ weights of 4 bits are supported")
        size = "q_group_size" if config.has("q_group_size") else "group_size"
        self.group_size = 0 if config.raw(size) == -1 else config.integer(size)
        if not config.flag("zero_point", True):
            raise config.unsupported("zero_point", "AWQ weights with zero points are supported")
        config.refuse_unread(_WITHOUT_EFFECT, _NEUTRAL)

    def describe(self, module: str, tensors: Mapping[str, TensorInfo], read: Read) -> Described | None:
        """See Scheme."""
        if (packed := tensors.get(f"{module}.qweight")) is None:
            return None
        names = tuple(f"{module}.{part}" for part in ("qweight", "qzeros", "scales"))
        if len(packed.shape) != 2 or any(name not in tensors for name in names):
            raise SnapshotError(f"tensor `{module}.qweight` has no scales and zeros, or is no matrix")
        in_features, out_features = packed.shape[0], packed.shape[1] * 8
        size = self.group_size or in_features
        groups = (-(-in_features // size), out_features)
        if tensors[names[2]].shape != groups or tensors[names[1]].shape != (groups[0], packed.shape[1]):
            raise SnapshotError(f"`{module}`: its scales or zeros do not fit groups of {size}")
        shape = (out_features, in_features)
        if in_features % size:
            return Described(shape, None, names, f"groups of {size} do not divide its {in_features} inputs")
        return Described(shape, LayerQuant(quant_algo="W4A16_AWQ", group_size=size, has_zero_point=True), names)

    def fixed(self, module: str, described: Described, read: Read) -> Parts:
        """See Scheme."""
        return {}

    def unpack(self, module: str, described: Described, read: Read) -> Parts:
        """See Scheme."""
        values, zeros = unpack_awq(read(f"{module}.qweight")), unpack_awq(read(f"{module}.qzeros"))
        scales = read(f"{module}.scales").float()
        if described.layer is None:
            size = self.group_size
            wide = [v.repeat_interleave(size, dim=0)[: values.shape[0]] for v in (zeros.float(), scales)]
            return {"weight": ((values.float() - wide[0]) * wide[1]).T.contiguous()}
        return {
            "weight": pack_nibbles(values.T.contiguous()),
            "weights_scaling_factor": scales.T.contiguous(),
            "zero": zeros.T.float().contiguous(),
        }
