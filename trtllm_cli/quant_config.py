"""How a checkpoint's weights and KV cache are quantized, in TensorRT-LLM's words."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

QuantAlgo = Literal[
    "NO_QUANT", "W8A16", "W4A16", "W4A16_AWQ", "W4A8_AWQ", "W8A16_GPTQ", "W4A16_GPTQ",
    "W8A8_SQ_PER_CHANNEL", "W8A8_SQ_PER_TENSOR_PLUGIN", "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN",
    "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN", "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN",
    "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_BLOCK_SCALES", "INT8", "MIXED_PRECISION", "NVFP4",
]  # fmt: skip
KvCacheQuantAlgo = Literal["FP8", "INT8", "NVFP4"]


class LayerQuant(BaseModel):
    """How one linear layer is stored and computed; models/stored.py says which tensors that makes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_algo: QuantAlgo
    group_size: int = Field(default=128, ge=1)  # inputs that share a scale, where the algorithm has groups
    has_zero_point: bool = False
    pre_quant_scale: bool = False  # activations are multiplied by a number per input first
    per_group: bool = False  # W8A16: a scale per output and group of inputs, not one per output
    act_order: bool = False  # GPTQ: inputs are sorted by their group, `perm` says how

    @model_serializer(mode="wrap")
    def _omit_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out what TensorRT-LLM's files do not have."""
        return {k: v for k, v in serialize(self).items() if k not in ("per_group", "act_order") or v}


class QuantConfig(LayerQuant):
    """The `quantization` part of a checkpoint's config.json: what all layers share, and where they differ."""

    quant_algo: QuantAlgo | None = None  # type: ignore[assignment]  # None: nothing is quantized
    kv_cache_quant_algo: KvCacheQuantAlgo | None = None
    smoothquant_val: float = 0.5
    clamp_val: list[float] | None = None
    use_meta_recipe: bool = False
    exclude_modules: list[str] | None = None  # patterns of module names, for every algorithm
    quantized_layers: dict[str, LayerQuant] | None = None  # MIXED_PRECISION: whole-model module name -> how

    @model_validator(mode="before")
    @classmethod
    def _modelopt_names(cls, data: Any) -> Any:
        """ModelOpt's name for FP8 weights in blocks."""
        if isinstance(data, dict) and data.get("quant_algo") == "fp8_pb_wo":
            return {**data, "quant_algo": "FP8_BLOCK_SCALES"}
        return data

    @model_validator(mode="after")
    def _mixed(self) -> QuantConfig:
        if (self.quant_algo == "MIXED_PRECISION") != (self.quantized_layers is not None):
            raise ValueError("quant_algo MIXED_PRECISION and quantized_layers belong together")
        return self

    @property
    def is_quantized(self) -> bool:
        """Whether any weight is quantized."""
        return self.quant_algo not in (None, "NO_QUANT")

    def layer_quant(self, module: str) -> LayerQuant | None:
        """How a linear layer is quantized, or None when it is left as it is.

        `module` is its name in the whole model without `.weight`, such as `transformer.layers.3.mlp.fc`.
        """
        if not self.is_quantized or any(fnmatch(module, pattern) for pattern in self.exclude_modules or ()):
            return None
        if self.quantized_layers is not None:
            found = self.quantized_layers.get(module)
            return None if found is None or found.quant_algo == "NO_QUANT" else found
        return LayerQuant.model_validate({name: getattr(self, name) for name in LayerQuant.model_fields})
