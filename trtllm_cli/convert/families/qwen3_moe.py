"""Qwen3-MoE: Qwen3 with experts in all layers or some."""

from __future__ import annotations

from typing import Any

from trtllm_cli.convert.families.family import Family, read_decoder
from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.convert.families.moe import expert_tensors, read_qwen_experts

_DEFAULTS = {
    "decoder_sparse_step": 1, "moe_intermediate_size": 768, "num_experts_per_tok": 8, "norm_topk_prob": False,
    "sliding_window": 4096,
}  # fmt: skip


def _read(fields: Fields) -> dict[str, Any]:
    fields.fill(_DEFAULTS)
    if not fields.has("num_local_experts"):
        fields.fill({"num_experts": 128})
    config = read_decoder(fields, num_kv_heads=4, max_positions=32768)
    bias, window = fields.flag("attention_bias", False), fields.integer("sliding_window", None)
    fields.raw("max_window_layers")  # of Qwen3; here a window is every layer's
    return {
        **config,
        "attn_bias": bias,
        "dense_bias": bias,
        "qk_layernorm": True,
        "sliding_window": window if fields.flag("use_sliding_window", False) else None,
        "moe": read_qwen_experts(fields, config["num_hidden_layers"]),
    }


FAMILY = Family("Qwen3MoeForCausalLM", "qwen3_moe", _read, expert_tensors=expert_tensors())
