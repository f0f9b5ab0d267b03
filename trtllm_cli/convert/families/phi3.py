"""Phi-3, Phi-3.5 and Phi-4: Llama with q, k and v, and gate and up, in one tensor each; LongRoPE in the long ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trtllm_cli.convert.families.family import DECODER_TENSORS, Family, Source, read_decoder
from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.convert.families.rope import read_rope

if TYPE_CHECKING:
    import torch

    from trtllm_cli.model_config import ModelConfig

_DEFAULTS = {"rms_norm_eps": 1e-5, "partial_rotary_factor": 1.0, "original_max_position_embeddings": 4096}
# Settings of Microsoft's own code that transformers' does not have, with the values at which that makes no difference.
_FIXED: dict[str, Any] = {
    "attention_bias": False, "mlp_bias": False, "lm_head_bias": False, "full_attn_mod": 1, "interpolate_factor": 1,
}  # fmt: skip


def _read(fields: Fields) -> dict[str, Any]:
    fields.fill(_DEFAULTS)
    for name, value in _FIXED.items():
        if fields.raw(name) not in (None, value):
            raise fields.unsupported(name, f"only {value!r} can be honoured")
    config = read_decoder(fields, num_kv_heads=None, max_positions=4096, rope=_read_rope)
    return {**config, "sliding_window": fields.integer("sliding_window", None)}


def _read_rope(fields: Fields, head_dim: int, max_positions: int) -> dict[str, Any]:
    """LongRoPE, under any of the names that it has had, or no scaling."""
    for name in ("rope_scaling", "rope_parameters"):
        table = fields.data.get(name)
        if isinstance(table, dict) and (table.get("rope_type") or table.get("type")) in ("su", "yarn"):
            fields.data = {**fields.data, name: {**table, "rope_type": "longrope"}}
    rope = read_rope(fields, head_dim, max_positions, partial="partial_rotary_factor")
    if rope["rotary_scaling"] and rope["rotary_scaling"]["rope_type"] != "longrope":
        name = "rope_scaling" if fields.has("rope_scaling") else "rope_parameters"
        raise fields.unsupported(name, "Phi3ForCausalLM has no scaling but longrope")
    return rope


def _gate_rows(config: ModelConfig) -> torch.Tensor:
    import torch

    return torch.arange(config.intermediate_size)


def _up_rows(config: ModelConfig) -> torch.Tensor:
    return _gate_rows(config) + config.intermediate_size


def _gate_up_height(config: ModelConfig) -> tuple[int, ...]:
    return (2 * config.intermediate_size,)


_GATE_UP = ("model.layers.{i}.mlp.gate_up_proj.weight",)
FAMILY = Family(
    "Phi3ForCausalLM",
    "phi3",
    _read,
    {
        **DECODER_TENSORS,
        "transformer.layers.{i}.attention.qkv.weight": ("model.layers.{i}.self_attn.qkv_proj.weight",),
        "transformer.layers.{i}.mlp.fc.weight": Source(_GATE_UP, rows=_gate_rows, heights=_gate_up_height),
        "transformer.layers.{i}.mlp.gate.weight": Source(_GATE_UP, rows=_up_rows, heights=_gate_up_height),
    },
)
