"""gpt-oss: experts as one tensor each for all, transposed, the rows of gate and up by turns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trtllm_cli.convert.families.family import DECODER_TENSORS, Family, Source, TensorTable, read_decoder, read_windows
from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.convert.families.moe import read_num_experts
from trtllm_cli.convert.families.rope import read_rope

if TYPE_CHECKING:
    import torch

    from trtllm_cli.model_config import ModelConfig

_DEFAULTS = {
    "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 150_000.0, "sliding_window": 128, "num_experts_per_tok": 4,
}  # fmt: skip
_ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
# The constants of functional.gated_act's "swiglu_oai".
_SWIGLU = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}


def _read_rope(fields: Fields, head_dim: int, max_positions: int) -> dict[str, Any]:
    if fields.has("rope_scaling") or fields.has("rope_parameters"):
        return read_rope(fields, head_dim, max_positions)
    return {"rotary_base": fields.number("rope_theta"), "rotary_scaling": _ROPE}


def _read(fields: Fields) -> dict[str, Any]:
    fields.fill(_DEFAULTS)
    if not fields.has("num_experts"):
        fields.fill({"num_local_experts": 128})
    for name in ("experts_per_token", "initial_context_length"):  # copies of other fields
        fields.raw(name)
    config = read_decoder(fields, num_kv_heads=8, max_positions=131_072, rope=_read_rope)
    for name, known in _SWIGLU.items():
        if fields.number(name, known) != known:
            raise fields.unsupported(name, f"only {known} can be honoured")
    bias = fields.flag("attention_bias", True)
    moe = {
        "num_experts": read_num_experts(fields),
        "top_k": fields.integer("num_experts_per_tok"),
        "intermediate_size": config["intermediate_size"],
    }
    return {
        **config,
        "hidden_act": "swiglu_oai",  # whatever hidden_act says
        "attn_bias": bias,
        "dense_bias": bias,
        "mlp_bias": True,
        "moe": moe,
        **read_windows(fields, config["num_hidden_layers"], 2),
    }


def up_then_gate(config: ModelConfig) -> torch.Tensor:
    """Of each expert's rows, which are the gate's and up's by turns: up's, then the gate's."""
    import torch

    assert config.moe is not None
    height = 2 * config.moe.intermediate_size
    of_one = torch.cat([torch.arange(1, height, 2), torch.arange(0, height, 2)])
    return (torch.arange(config.moe.num_experts).unsqueeze(1) * height + of_one).flatten()


_LAYER, _THEIRS = "transformer.layers.{i}", "model.layers.{i}"
_EXPERTS = f"{_THEIRS}.mlp.experts"
_TENSORS = {**DECODER_TENSORS, f"{_LAYER}.attention.sinks": (f"{_THEIRS}.self_attn.sinks",)}
_EXPERT_TENSORS: TensorTable = {
    f"{_LAYER}.mlp.router.weight": (f"{_THEIRS}.mlp.router.weight",),
    f"{_LAYER}.mlp.router.bias": (f"{_THEIRS}.mlp.router.bias",),
    f"{_LAYER}.mlp.fc.weight": Source((f"{_EXPERTS}.gate_up_proj",), rows=up_then_gate, transposed=True),
    f"{_LAYER}.mlp.fc.bias": Source((f"{_EXPERTS}.gate_up_proj_bias",), rows=up_then_gate),
    f"{_LAYER}.mlp.proj.weight": Source((f"{_EXPERTS}.down_proj",), transposed=True),
    f"{_LAYER}.mlp.proj.bias": (f"{_EXPERTS}.down_proj_bias",),
}

FAMILY = Family("GptOssForCausalLM", "gpt_oss", _read, tensors=_TENSORS, expert_tensors=_EXPERT_TENSORS)
