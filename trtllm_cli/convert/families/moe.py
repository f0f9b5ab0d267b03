"""What the families with experts share: the names of their tensors, and the fields that say which layers have any."""

from __future__ import annotations

from typing import Any

from trtllm_cli.convert.families.family import TensorTable
from trtllm_cli.convert.families.fields import Fields

_MLP = "transformer.layers.{i}.mlp"


def expert_tensors(
    block: str = "mlp",
    *,
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    shared: str = "shared_expert",
) -> TensorTable:
    """A layer's experts, stored one by one in `model.layers.{i}.BLOCK.experts.{e}`, and one that all tokens share."""
    theirs, (gate, up, down) = f"model.layers.{{i}}.{block}", projections
    expert = f"{theirs}.experts.{{e}}"
    return {
        f"{_MLP}.router.weight": (f"{theirs}.gate.weight",),
        f"{_MLP}.router.e_score_correction_bias": (f"{theirs}.gate.e_score_correction_bias",),
        f"{_MLP}.fc.weight": (f"{expert}.{up}.weight", f"{expert}.{gate}.weight"),
        f"{_MLP}.proj.weight": (f"{expert}.{down}.weight",),
        f"{_MLP}.shared_expert.fc.weight": (f"{theirs}.{shared}.gate_proj.weight",),
        f"{_MLP}.shared_expert.gate.weight": (f"{theirs}.{shared}.up_proj.weight",),
        f"{_MLP}.shared_expert.proj.weight": (f"{theirs}.{shared}.down_proj.weight",),
        f"{_MLP}.shared_expert_gate.weight": (f"{theirs}.shared_expert_gate.weight",),
    }


def read_num_experts(fields: Fields) -> int:
    """`num_experts`, which transformers 5 writes as `num_local_experts` for some families."""
    old, new = fields.integer("num_experts", None), fields.integer("num_local_experts", None)
    if old is not None and new is not None and old != new:
        raise fields.unsupported("num_experts", f"num_local_experts is there too, and says {new}")
    return int(old or new or fields.integer("num_experts"))


def read_qwen_experts(fields: Fields, num_layers: int) -> dict[str, Any]:
    """MoeConfig's fields of Qwen2-MoE and Qwen3-MoE. The defaults must be filled in."""
    step = fields.integer("decoder_sparse_step")
    dense = fields.raw("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(i, int) and 0 <= i < num_layers for i in dense):
        raise fields.wrong("mlp_only_layers", "a list of layers, counted from 0")
    return {
        "num_experts": read_num_experts(fields),
        "top_k": fields.integer("num_experts_per_tok"),
        "intermediate_size": fields.integer("moe_intermediate_size"),
        "renormalize": fields.flag("norm_topk_prob"),
        "dense_layers": [i for i in range(num_layers) if i in dense or (i + 1) % step],
    }
