"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with experts in all layers or some, one of them for every token behind a gate."""

from __future__ import annotations

from typing import Any

from trtllm_cli.convert.families.family import Family, read_decoder, read_layer_types, window_fields
from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.convert.families.moe import expert_tensors, read_qwen_experts

_DEFAULTS = {
    "decoder_sparse_step": 1, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4, "norm_topk_prob": False, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip


def _read_window(fields: Fields, num_layers: int) -> dict[str, Any]:
    """Where it is switched on, every second layer before `max_window_layers` slides."""
    on = fields.flag("use_sliding_window", False)
    window, last = fields.integer("sliding_window", None, minimum=0), fields.integer("max_window_layers", minimum=0)
    default = ["sliding_attention" if on and i < last and i % 2 == 0 else "full_attention" for i in range(num_layers)]
    types = read_layer_types(fields, num_layers, default)
    if "sliding_attention" in types and not on:
        raise fields.unsupported("layer_types", "it has sliding_attention, but use_sliding_window is not on")
    if "sliding_attention" in types and not window:
        raise fields.wrong("sliding_window", "an integer of at least 1, as there are layers that slide")
    return window_fields(window, types)


def _read(fields: Fields) -> dict[str, Any]:
    fields.fill(_DEFAULTS)
    if not fields.has("num_local_experts"):
        fields.fill({"num_experts": 60})
    config = read_decoder(fields, num_kv_heads=16, max_positions=32768)
    layers = config["num_hidden_layers"]
    shared = fields.integer("shared_expert_intermediate_size")
    moe = {
        **read_qwen_experts(fields, layers),
        "shared_expert_intermediate_size": shared,
        "shared_expert_gate": True,
    }
    return {**config, "attn_bias": fields.flag("qkv_bias", True), "moe": moe, **_read_window(fields, layers)}


FAMILY = Family("Qwen2MoeForCausalLM", "qwen2_moe", _read, expert_tensors=expert_tensors())
