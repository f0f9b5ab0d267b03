"""DeepSeek-V2, and what V3 shares with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trtllm_cli.convert.families.family import DECODER_TENSORS, Family, Source, TensorTable, read_decoder
from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.convert.families.moe import expert_tensors
from trtllm_cli.convert.families.rope import read_rope

if TYPE_CHECKING:
    import torch

    from trtllm_cli.model_config import MlaConfig, ModelConfig

DEFAULTS: dict[str, Any] = {
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip
_V2_DEFAULTS: dict[str, Any] = {
    **DEFAULTS, "n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1407,
    "first_k_dense_replace": 0, "routed_scaling_factor": 1.0, "topk_method": "greedy", "norm_topk_prob": False,
}  # fmt: skip


def read_attention(fields: Fields, *, max_positions: int, interleaved: bool) -> dict[str, Any]:
    """What all of a decoder's fields but the experts say."""
    rope_dim = fields.integer("qk_rope_head_dim")
    mla = {
        "q_lora_rank": fields.integer("q_lora_rank", None),
        "kv_lora_rank": fields.integer("kv_lora_rank"),
        "qk_nope_head_dim": fields.integer("qk_nope_head_dim"),
        "qk_rope_head_dim": rope_dim,
        "v_head_dim": fields.integer("v_head_dim"),
    }
    config = read_decoder(
        fields, num_kv_heads=None, max_positions=max_positions, rope=lambda f, _, m: read_rope(f, rope_dim, m)
    )
    if config["num_key_value_heads"] != config["num_attention_heads"]:
        raise fields.unsupported("num_key_value_heads", "each head has a key of its own in this attention")
    bias = fields.flag("attention_bias", False)
    return {
        **config,
        "head_size": mla["qk_nope_head_dim"] + rope_dim,
        "rotary_embedding_dim": rope_dim,
        "position_embedding_type": "rope_gptj" if interleaved else "rope_gpt_neox",
        "attn_bias": bias,
        "dense_bias": bias,
        "mla": mla,
    }


def read_experts(fields: Fields, num_layers: int, *, scoring: str, methods: tuple[str, ...]) -> dict[str, Any]:
    """MoeConfig's fields but for the groups. `methods` are what `topk_method` may be, the default first."""
    if fields.integer("moe_layer_freq", 1) != 1:
        raise fields.unsupported("moe_layer_freq", "only 1 can be honoured")
    for name, known in (("topk_method", methods), ("scoring_func", (scoring,))):
        if fields.text(name, known[0]) not in known:
            raise fields.unsupported(name, f"{' and '.join(known)} can be honoured")
    width, shared = fields.integer("moe_intermediate_size"), fields.integer("n_shared_experts", 0, minimum=0)
    dense = fields.integer("first_k_dense_replace", minimum=0)
    return {
        "num_experts": fields.integer("n_routed_experts"),
        "top_k": fields.integer("num_experts_per_tok"),
        "intermediate_size": width,
        "scoring": scoring,
        "renormalize": fields.flag("norm_topk_prob"),
        "routed_scaling_factor": fields.number("routed_scaling_factor"),
        "shared_expert_intermediate_size": shared * width,
        "dense_layers": list(range(min(dense, num_layers))),
    }


def read_groups(fields: Fields, *, used: bool) -> dict[str, Any]:
    """Of one group nothing is left to choose."""
    groups, top = fields.integer("n_group", None), fields.integer("topk_group", None)
    if not used or groups == 1:
        return {}
    if groups is None or top is None:
        name = "n_group" if groups is None else "topk_group"
        raise fields.wrong(name, "an integer, as experts are chosen by groups")
    return {"num_groups": groups, "top_groups": top}


def _read(fields: Fields) -> dict[str, Any]:
    fields.fill(_V2_DEFAULTS)
    config = read_attention(fields, max_positions=2048, interleaved=True)
    moe = read_experts(
        fields, config["num_hidden_layers"], scoring="softmax", methods=("greedy", "group_limited_greedy")
    )
    if moe["renormalize"]:
        raise fields.unsupported("norm_topk_prob", "transformers and the model's own code differ in what it means")
    if fields.flag("mlp_bias", False):
        raise fields.unsupported("mlp_bias", "only False can be honoured")
    groups = read_groups(fields, used=fields.text("topk_method", "greedy") == "group_limited_greedy")
    return {**config, "moe": {**moe, **groups}}


def _part(of: Callable[[MlaConfig], tuple[int, int, int]]) -> dict[str, Any]:
    """Of each head's rows, some: `of` gives how many come before them, how many they are, and how many there are."""

    def rows(config: ModelConfig) -> torch.Tensor:
        import torch

        assert config.mla is not None
        first, count, height = of(config.mla)
        heads = torch.arange(config.num_attention_heads).unsqueeze(1) * height
        return (heads + torch.arange(first, first + count)).flatten()

    def heights(config: ModelConfig) -> tuple[int, ...]:
        assert config.mla is not None
        return (config.num_attention_heads * of(config.mla)[2],)

    return {"rows": rows, "heights": heights}


_Q_NOPE = _part(lambda m: (0, m.qk_nope_head_dim, m.qk_nope_head_dim + m.qk_rope_head_dim))
_Q_ROPE = _part(lambda m: (m.qk_nope_head_dim, m.qk_rope_head_dim, m.qk_nope_head_dim + m.qk_rope_head_dim))
_KEYS = _part(lambda m: (0, m.qk_nope_head_dim, m.qk_nope_head_dim + m.v_head_dim))
_VALUES = _part(lambda m: (m.qk_nope_head_dim, m.v_head_dim, m.qk_nope_head_dim + m.v_head_dim))
_OURS, _THEIRS = "transformer.layers.{i}.attention", "model.layers.{i}.self_attn"
TENSORS: TensorTable = {
    **DECODER_TENSORS,
    f"{_OURS}.q_a_proj.weight": (f"{_THEIRS}.q_a_proj.weight",),
    f"{_OURS}.q_a_proj.bias": (f"{_THEIRS}.q_a_proj.bias",),
    f"{_OURS}.q_a_layernorm.weight": (f"{_THEIRS}.q_a_layernorm.weight",),
    f"{_OURS}.q_b_nope_proj.weight": Source((f"{_THEIRS}.q_b_proj.weight",), **_Q_NOPE),
    f"{_OURS}.q_b_rope_proj.weight": Source((f"{_THEIRS}.q_b_proj.weight",), **_Q_ROPE),
    f"{_OURS}.q_nope_proj.weight": Source((f"{_THEIRS}.q_proj.weight",), **_Q_NOPE),
    f"{_OURS}.q_rope_proj.weight": Source((f"{_THEIRS}.q_proj.weight",), **_Q_ROPE),
    f"{_OURS}.kv_a_proj.weight": (f"{_THEIRS}.kv_a_proj_with_mqa.weight",),
    f"{_OURS}.kv_a_proj.bias": (f"{_THEIRS}.kv_a_proj_with_mqa.bias",),
    f"{_OURS}.kv_a_layernorm.weight": (f"{_THEIRS}.kv_a_layernorm.weight",),
    f"{_OURS}.k_b_proj.weight": Source((f"{_THEIRS}.kv_b_proj.weight",), **_KEYS),
    f"{_OURS}.v_b_proj.weight": Source((f"{_THEIRS}.kv_b_proj.weight",), **_VALUES),
}
EXPERT_TENSORS = expert_tensors(shared="shared_experts")
# head_dim and qk_head_dim are what transformers 5 works out of other fields.
WITHOUT_EFFECT = frozenset({"head_dim", "qk_head_dim", "ep_size", "num_mtp_layers", "num_nextn_predict_layers"})

FAMILY = Family(
    "DeepseekV2ForCausalLM",
    "deepseek_v2",
    _read,
    tensors=TENSORS,
    expert_tensors=EXPERT_TENSORS,
    without_effect=WITHOUT_EFFECT,
)
