"""GPTQ snapshots (arXiv 2210.17323), as AutoGPTQ and GPTQModel write them: 4 and 8 bits, with and without act-order."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.convert.prequantized.scheme import Described, Parts, Read
from trtllm_cli.convert.prequantized.unpack import unpack_columns, unpack_rows
from trtllm_cli.errors import SnapshotError
from trtllm_cli.kernels.quantization import pack_nibbles
from trtllm_cli.quant_config import KvCacheQuantAlgo, LayerQuant
from trtllm_cli.tensor_file import TensorInfo

_WITHOUT_EFFECT = {
    "quant_method", "damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "model_name_or_path",
    "model_file_base_name", "is_marlin_format", "dataset", "tokenizer", "batch_size", "backend", "cache_block_outputs",
    "exllama_config", "use_exllama", "max_input_length", "module_name_preceding_first_block", "pad_token_id",
    "block_name_to_quantize", "model_seqlen", "use_cuda_fp16", "modules_in_block_to_quantize", "meta", "pack_dtype",
    "desc_act", "lm_head", "quantizer", "checkpoint_format",
}  # fmt: skip


class Gptq:
    """`qweight` int32 [in * bits / 32, out], `qzeros` int32 [groups, out * bits / 32], `scales` [groups, out], `g_idx`
    int32 [in]: each input's group. The first format stores zeros less one.
    """

    kv_cache: KvCacheQuantAlgo | None = None

    def __init__(self, config: Fields) -> None:
        self.bits = config.integer("bits")
        if self.bits not in (4, 8):
            raise config.unsupported("bits", "GPTQ weights of 4 and 8 bits are supported")
        size = config.raw("group_size")
        self.group_size = 0 if size in (None, -1) else config.integer("group_size")
        self.symmetric = config.flag("sym", True)
        stored = config.text("checkpoint_format", "gptq")
        if stored not in ("gptq", "gptq_v2"):
            raise config.unsupported("checkpoint_format", "gptq and gptq_v2 are supported")
        self.zero_shift = 1 if stored == "gptq" else 0
        if config.has("dynamic"):
            raise config.unsupported("dynamic", "other settings for some modules are not supported")
        config.refuse_unread(_WITHOUT_EFFECT, {"dynamic": (None, {})})

    def describe(self, module: str, tensors: Mapping[str, TensorInfo], read: Read) -> Described | None:
        """See Scheme. `g_idx` is read: it says whether the inputs are in order."""
        if (packed := tensors.get(f"{module}.qweight")) is None:
            return None
        names = tuple(n for p in ("qweight", "qzeros", "scales", "g_idx") if (n := f"{module}.{p}") in tensors)
        if len(packed.shape) != 2 or f"{module}.scales" not in tensors:
            raise SnapshotError(f"tensor `{module}.qweight` has no scales, or is no matrix")
        out_features, in_features = packed.shape[1], packed.shape[0] * 32 // self.bits
        shape, size = (out_features, in_features), self.group_size or in_features
        act_order = False
        if f"{module}.g_idx" in tensors:
            groups = read(f"{module}.g_idx").long()
            if groups.shape != (in_features,):
                raise SnapshotError(f"tensor `{module}.g_idx` is {list(groups.shape)}, not [{in_features}]")
            act_order = bool((groups != torch.arange(in_features) // size).any())
            counts = torch.bincount(groups.clamp_min(0))
            if int(groups.min()) < 0 or len(counts) != -(-in_features // size):
                raise SnapshotError(f"tensor `{module}.g_idx` names groups that its scales do not have")
            if act_order and bool((counts != size).any()):
                return Described(shape, None, names, "its groups are not equally large")
        if in_features % size:
            return Described(shape, None, names, f"groups of {size} do not divide its {in_features} inputs")
        if self.bits == 8 and not self.symmetric:
            return Described(shape, None, names, "8-bit weights with zero points")
        layer = LayerQuant(
            quant_algo="W4A16_GPTQ" if self.bits == 4 else "W8A16_GPTQ",
            group_size=size,
            has_zero_point=not self.symmetric,
            act_order=act_order,
        )
        return Described(shape, layer, names)

    def fixed(self, module: str, described: Described, read: Read) -> Parts:
        """See Scheme."""
        if described.layer is None or not described.layer.act_order:
            return {}
        return {"perm": torch.argsort(read(f"{module}.g_idx"), stable=True).int()}

    def unpack(self, module: str, described: Described, read: Read) -> Parts:
        """See Scheme."""
        values = unpack_rows(read(f"{module}.qweight"), self.bits)  # [in, out]
        scales = read(f"{module}.scales").float()
        zeros = unpack_columns(read(f"{module}.qzeros"), self.bits).int() + self.zero_shift
        zeros &= (1 << self.bits) - 1 if self.zero_shift else -1
        if zeros.shape != scales.shape or scales.shape[1] != values.shape[1]:
            raise SnapshotError(
                f"`{module}`: scales {list(scales.shape)} and zeros {list(zeros.shape)} do not fit "
                f"{values.shape[1]} outputs"
            )
        middle = 1 << (self.bits - 1)
        if self.symmetric and bool((zeros != middle).any()):
            raise SnapshotError(f"`{module}.qzeros` are not all {middle}, although quantization_config says sym")
        layer = described.layer
        size = self.group_size or values.shape[0]
        if layer is None:
            groups = torch.arange(values.shape[0]) // size
            if f"{module}.g_idx" in described.tensors:
                groups = read(f"{module}.g_idx").long()
            return {"weight": ((values.int() - zeros[groups]).float() * scales[groups]).T.contiguous()}
        if layer.act_order:
            values = values[self.fixed(module, described, read)["perm"].long()]
        parts = {"weights_scaling_factor": scales.T.contiguous()}
        if self.bits == 8:
            parts["weight"] = (values.T.int() - middle).to(torch.int8).contiguous()
        else:
            parts["weight"] = pack_nibbles(values.T.contiguous())
        if layer.has_zero_point:
            parts["zero"] = zeros.T.float().contiguous()
        return parts
