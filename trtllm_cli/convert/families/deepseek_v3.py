"""DeepSeek-V3 and R1: experts chosen by groups and with a bias; layers for multi-token prediction are left out."""

from __future__ import annotations

from typing import Any

from trtllm_cli.convert.families.deepseek_v2 import (
    DEFAULTS,
    EXPERT_TENSORS,
    TENSORS,
    WITHOUT_EFFECT,
    read_attention,
    read_experts,
    read_groups,
)
from trtllm_cli.convert.families.family import Family
from trtllm_cli.convert.families.fields import Fields

_DEFAULTS: dict[str, Any] = {
    **DEFAULTS, "n_routed_experts": 256, "n_shared_experts": 1, "moe_intermediate_size": 2048, "n_group": 8,
    "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}  # fmt: skip


def _read(fields: Fields) -> dict[str, Any]:
    fields.fill(_DEFAULTS)
    config = read_attention(fields, max_positions=4096, interleaved=fields.flag("rope_interleave", True))
    moe = read_experts(fields, config["num_hidden_layers"], scoring="sigmoid", methods=("noaux_tc",))
    return {**config, "moe": {**moe, "correction_bias": True, **read_groups(fields, used=True)}}


FAMILY = Family(
    "DeepseekV3ForCausalLM",
    "deepseek_v3",
    _read,
    tensors=TENSORS,
    expert_tensors=EXPERT_TENSORS,
    without_effect=WITHOUT_EFFECT,
    extra_layers=True,
)
