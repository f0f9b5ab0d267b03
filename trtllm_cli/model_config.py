"""A checkpoint's config.json: TensorRT-LLM's field names, each with one meaning, unknown ones refused."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from trtllm_cli.mapping import Mapping
from trtllm_cli.quant_config import QuantConfig
from trtllm_cli.tensorrt_llm_names import with_our_names

DType = Literal["float32", "float16", "bfloat16"]
Activation = Literal["silu", "gelu", "gelu_pytorch_tanh", "relu", "swiglu_oai"]
LayerType = Literal["full_attention", "sliding_attention"]

# What they write about the file, or about the architecture a second time.
_LABELS = {"rank", "decoder", "qwen_type"}
# Fields that TensorRT-LLM and ModelOpt write and that change nothing here, with the values that mean nothing.
# Any other value is refused: it would mean something that we do not do.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "rotary_pct": (None, 1.0),
    "rmsnorm": (None, True),
    "bias": (None, False),
    "residual_mlp": (None, False),
    "disable_weight_only_quant_plugin": (None, False),
    "remove_duplicated_kv_heads": (None, False),
    "fc_after_embed": (None, False),
    "use_input_layernorm_in_first_layer": (None, True),
    "use_last_layernorm": (None, True),
    "layer_idx_offset": (None, 0),
    "use_prompt_tuning": (None, False),
    "has_partial_lora_mask": (None, False),
    "mlp_output": (None, False),
    "tie_word_embeddings": (None, False, True),  # lm_head.weight is read when it is there
}


_OF_FEW = {
    "norm_bias", "lm_head_bias", "embedding_multiplier", "residual_multiplier", "output_multiplier_scale",
    "parallel_residual", "parallel_norms", "scale_attn_by_inverse_layer_idx",
}  # fmt: skip


def _moe_of_tensorrt_llm(config: dict[str, Any]) -> dict[str, Any] | None:
    """`moe` with our names, where it has those of TensorRT-LLM's MoeConfig; None for its dense models.

    Takes what TensorRT-LLM says of the experts' widths out of `config`.
    """
    moe = config["moe"]
    width, shared = config.pop("moe_intermediate_size", 0), config.pop("moe_shared_expert_intermediate_size", 0)
    if not moe.get("num_experts"):
        return None
    if "normalization_mode" not in moe:
        return dict(moe)
    rest = dict(moe)
    for name, harmless in _MOE_WITHOUT_EFFECT.items():
        if name in rest and (value := rest.pop(name)) not in harmless:
            raise ValueError(f"`moe.{name}` is {value!r}, which is not supported")
    # 0: the scores of all experts; 1: of the chosen ones alone
    mode = rest.pop("normalization_mode")
    if mode not in (0, 1):
        raise ValueError(f"`moe.normalization_mode` is {mode!r}, which is not supported")
    if shared:  # Qwen2-MoE alone has it
        rest |= {"shared_expert_intermediate_size": shared, "shared_expert_gate": True}
    return {"intermediate_size": width or config.get("intermediate_size"), "renormalize": mode == 1, **rest}


_MOE_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "sparse_mixer_epsilon": (0.01, None),
    "tp_mode": (0, 1, 2),
    "device_limited_n_group": (0, None),
    "device_limited_topk_group": (0, None),
    "device_limited_routed_scaling_factor": (0.0, 1.0, None),
    "use_all_reduce": (None, True, False),
}


class RopeScaling(BaseModel):
    """Rotary position scaling, with transformers' field names (its `rope_utils`), all types that it has for Llama."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rope_type: Literal["linear", "dynamic", "yarn", "longrope", "llama3"]
    factor: float | None = Field(default=None, ge=1.0)
    original_max_position_embeddings: int | None = Field(default=None, ge=1)
    attention_factor: float | None = None  # yarn, longrope
    beta_fast: float | None = None  # yarn
    beta_slow: float | None = None  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool | None = None  # yarn
    short_factor: list[float] | None = None  # longrope
    long_factor: list[float] | None = None  # longrope
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3

    @model_validator(mode="before")
    @classmethod
    def _old_name(cls, data: Any) -> Any:
        """`type` is what TensorRT-LLM, and transformers of old, call it."""
        if isinstance(data, dict) and "type" in data and data.get("rope_type") in (None, data["type"]):
            return {**{k: v for k, v in data.items() if k != "type"}, "rope_type": data["type"]}
        return data


class MoeConfig(BaseModel):
    """A mixture of experts: which layers have one, its shape, and how tokens find their experts (functional.route)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_experts: int = Field(ge=1)
    top_k: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)  # of one expert
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True  # the weights of a token's experts are divided by their sum
    routed_scaling_factor: float = 1.0
    num_groups: int | None = Field(default=None, ge=1)
    top_groups: int | None = Field(default=None, ge=1)
    correction_bias: bool = False  # DeepSeek-V3: the choice, not the weight, has a bias
    shared_expert_intermediate_size: int = Field(default=0, ge=0)  # 0: no shared expert
    shared_expert_gate: bool = False  # Qwen2-MoE: the shared expert is multiplied by sigmoid of a linear
    dense_layers: list[int] = []  # layers with an ordinary MLP

    @model_validator(mode="after")
    def _counts_agree(self) -> MoeConfig:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} is more than the {self.num_experts} experts")
        if (self.num_groups is None) != (self.top_groups is None):
            raise ValueError("num_groups and top_groups belong together")
        if self.num_groups and (self.num_experts % self.num_groups or self.top_groups > self.num_groups):  # type: ignore[operator]
            raise ValueError("num_groups must divide num_experts, and top_groups be at most num_groups")
        if self.num_groups and self.top_k > self.num_experts // self.num_groups * self.top_groups:  # type: ignore[operator]
            raise ValueError(f"top_k {self.top_k} is more than the experts of top_groups groups")
        if self.num_groups and self.scoring == "sigmoid" and self.num_experts < 2 * self.num_groups:
            raise ValueError("a group must have two experts or more")
        return self


class MlaConfig(BaseModel):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): the widths of its projections."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    q_lora_rank: int | None = Field(default=None, ge=1)  # None: q comes straight from the hidden state
    kv_lora_rank: int = Field(ge=1)
    qk_nope_head_dim: int = Field(ge=1)
    qk_rope_head_dim: int = Field(ge=2)
    v_head_dim: int = Field(ge=1)


class ModelConfig(BaseModel):
    """Everything that a model's graph depends on, but the rank."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    producer: dict[str, str] | None = None
    architecture: str
    dtype: DType
    logits_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    vocab_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1, le=4096)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(default=0, ge=0, validate_default=True)  # 0: as many as attention heads
    head_size: int = Field(default=0, ge=0)  # 0: hidden_size / num_attention_heads
    intermediate_size: int = Field(default=0, ge=0)  # 0: 4 * hidden_size
    hidden_act: Activation
    norm_epsilon: float = Field(default=1e-5, gt=0)
    max_position_embeddings: int = Field(default=2048, ge=1, lt=2**31)
    position_embedding_type: Literal["learned_absolute", "rope_gpt_neox", "rope_gptj"] = "learned_absolute"
    rotary_base: float = Field(default=10000.0, gt=0)
    rotary_embedding_dim: int = Field(default=0, ge=0)  # 0: head_size
    rotary_scaling: RopeScaling | None = None
    attn_bias: bool = False  # on qkv
    dense_bias: bool = False  # on the attention's output projection
    mlp_bias: bool = False
    qk_layernorm: bool = False
    sliding_window: int | None = Field(default=None, ge=1)  # tokens, the present one counted in
    layer_types: list[LayerType] | None = None  # None: every layer slides if sliding_window is set
    rope_local_base_freq: float | None = Field(default=None, gt=0)  # Gemma 3: rotary_base of sliding layers
    norm_bias: bool = True  # layer norms have a bias
    lm_head_bias: bool = False
    attn_logit_softcapping: float | None = Field(default=None, gt=0)
    final_logit_softcapping: float | None = Field(default=None, gt=0)
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None  # of attention's scores; None: head_size ** -0.5
    scale_attn_by_inverse_layer_idx: bool = False  # GPT-2: scores of layer i are also divided by i + 1
    residual_multiplier: float = 1.0
    output_multiplier_scale: float = 1.0  # of the logits
    parallel_residual: bool = False  # attention and MLP read the same residual stream
    parallel_norms: Literal[1, 2] = 1  # with parallel_residual: one norm for both, or one each
    moe: MoeConfig | None = None
    mla: MlaConfig | None = None
    use_parallel_embedding: bool = False
    embedding_sharding_dim: Literal[0, 1] = 0
    share_embedding_table: bool = False  # lm_head uses transformer.vocab_embedding.weight
    mapping: Mapping = Mapping()
    quantization: QuantConfig = QuantConfig()
    runtime_defaults: dict[str, Any] | None = None

    @model_serializer(mode="wrap")
    def _omit_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out what only a few families have, so that the others' files are as TensorRT-LLM writes them."""
        fields = type(self).model_fields
        return {k: v for k, v in serialize(self).items() if k not in _OF_FEW or v != fields[k].default}

    @model_validator(mode="before")
    @classmethod
    def _drop_without_effect(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = with_our_names({name: value for name, value in data.items() if name not in _LABELS})
        if isinstance(data.get("moe"), dict):
            data["moe"] = _moe_of_tensorrt_llm(data)
        for field, harmless in _WITHOUT_EFFECT.items():
            if field in data and (value := data.pop(field)) not in harmless:
                raise ValueError(f"`{field}` is {value!r}, which is not supported")
        return data

    @model_validator(mode="after")
    def _fill_defaults(self) -> ModelConfig:
        fill = object.__setattr__  # frozen for everyone else
        if not self.num_key_value_heads:
            fill(self, "num_key_value_heads", self.num_attention_heads)
        if not self.head_size:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError("hidden_size is no multiple of num_attention_heads, and head_size is not given")
            fill(self, "head_size", self.hidden_size // self.num_attention_heads)
        if not self.intermediate_size:
            fill(self, "intermediate_size", 4 * self.hidden_size)
        if not self.rotary_embedding_dim:
            fill(self, "rotary_embedding_dim", self.head_size)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads is no multiple of num_key_value_heads")
        if self.rotary_embedding_dim > self.head_size or self.rotary_embedding_dim % 2:
            raise ValueError("rotary_embedding_dim must be even and at most head_size")
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError("layer_types must name each of the num_hidden_layers layers")
        if self.layer_types and "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("layer_types has sliding_attention, but sliding_window is not set")
        tp = self.mapping.tp_size
        if self.num_attention_heads % tp or self.intermediate_size % tp:
            raise ValueError(f"tp_size {tp} does not divide the heads or intermediate_size")
        self._experts_divide()
        if self.num_key_value_heads % tp and tp % self.num_key_value_heads:
            raise ValueError(f"tp_size {tp} neither divides the {self.num_key_value_heads} KV heads nor is a multiple")
        if self.mapping.pp_size > self.num_hidden_layers:
            raise ValueError(f"pp_size {self.mapping.pp_size} is more than the {self.num_hidden_layers} layers")
        return self

    def _experts_divide(self) -> None:
        tp, moe_tp, moe_ep = self.mapping.tp_size, self.mapping.moe_tp, self.mapping.moe_ep
        if self.moe is None:
            if moe_ep > 1:
                raise ValueError(f"moe_ep_size is {moe_ep}, and {self.architecture} has no experts")
            return
        if self.moe.num_experts % moe_ep:
            raise ValueError(f"moe_ep_size {moe_ep} does not divide the {self.moe.num_experts} experts")
        if self.moe.intermediate_size % moe_tp:
            size = f"moe_tp_size {moe_tp}" if moe_ep > 1 else f"tp_size {tp}"
            raise ValueError(f"{size} does not divide the experts' intermediate_size {self.moe.intermediate_size}")
        if self.moe.shared_expert_intermediate_size % tp:
            width = self.moe.shared_expert_intermediate_size
            raise ValueError(f"tp_size {tp} does not divide the shared experts' intermediate_size {width}")

    def window_of(self, layer: int) -> int | None:
        """The attention window of a layer in tokens, or None for full attention."""
        if self.layer_types is not None and self.layer_types[layer] == "full_attention":
            return None
        return self.sliding_window

    def moe_of(self, layer: int) -> MoeConfig | None:
        """A layer's experts, or None where it has an ordinary MLP."""
        return None if self.moe is None or layer in self.moe.dense_layers else self.moe

    @property
    def padded_vocab_size(self) -> int:
        """vocab_size rounded up to a multiple of tp_size."""
        tp = self.mapping.tp_size
        return -(-self.vocab_size // tp) * tp

    @property
    def kv_heads_per_rank(self) -> int:
        """KV heads that each tensor-parallel rank holds; one is repeated when there are fewer heads than ranks."""
        return max(1, self.num_key_value_heads // self.mapping.tp_size)

    @property
    def heads_per_rank(self) -> int:
        """Query heads that each tensor-parallel rank holds."""
        return self.num_attention_heads // self.mapping.tp_size
