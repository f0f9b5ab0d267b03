"""Mixtral: Mistral with experts in every layer."""

from __future__ import annotations

from typing import Any

from trtllm_cli.convert.families.family import Family, read_decoder
from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.convert.families.moe import expert_tensors, read_num_experts

_DEFAULTS = {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_experts_per_tok": 2}


def _read(fields: Fields) -> dict[str, Any]:
    fields.fill(_DEFAULTS)
    if not fields.has("num_experts"):
        fields.fill({"num_local_experts": 8})
    config = read_decoder(fields, num_kv_heads=8, max_positions=4096 * 32)
    moe = {
        "num_experts": read_num_experts(fields),
        "top_k": fields.integer("num_experts_per_tok"),
        "intermediate_size": config["intermediate_size"],
    }
    return {**config, "moe": moe, "sliding_window": fields.integer("sliding_window", None)}


FAMILY = Family(
    "MixtralForCausalLM",
    "mixtral",
    _read,
    expert_tensors=expert_tensors("block_sparse_moe", projections=("w1", "w3", "w2")),
)
