"""How a checkpoint's weights and KV cache are quantized, in TensorRT-LLM's words."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

QuantAlgo = Literal[
    "NO_QUANT", "W8A16", "W4A16", "W4A16_AWQ", "W4A8_AWQ", "W8A16_GPTQ", "W4A16_GPTQ",
    "W8A8_SQ_PER_CHANNEL", "W8A8_SQ_PER_TENSOR_PLUGIN", "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN",
    "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN", "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN",
    "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_BLOCK_SCALES", "INT8", "MIXED_PRECISION", "NVFP4",
]  # fmt: skip
KvCacheQuantAlgo = Literal["FP8", "INT8", "NVFP4"]


class QuantConfig(BaseModel):
    """The `quantization` part of a checkpoint's config.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_algo: QuantAlgo | None = None
    kv_cache_quant_algo: KvCacheQuantAlgo | None = None
    group_size: int = Field(default=128, ge=1)
    smoothquant_val: float = 0.5
    clamp_val: list[float] | None = None
    use_meta_recipe: bool = False
    has_zero_point: bool = False
    pre_quant_scale: bool = False
    exclude_modules: list[str] | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether any weight is quantized."""
        return self.quant_algo not in (None, "NO_QUANT")

    def algo_of(self, module: str) -> QuantAlgo | None:
        """The algorithm for a linear layer (its name without `.weight`), or None when it is left as it is."""
        if not self.is_quantized:
            return None
        if any(fnmatch(module, pattern) for pattern in self.exclude_modules or ()):
            return None
        return self.quant_algo
